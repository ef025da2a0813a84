/* Counts the guest instructions that an emulated program executes: a plugin for qemu-user.
 *
 *     qemu-aarch64 -plugin count.so PROGRAM
 *
 * The program asks with the system call 0x5EED(descriptor), which no kernel has: the plugin then writes the count so
 * far, eight bytes in the byte order of the host, to that descriptor, which guest and emulator share. Nothing is
 * printed, and no file is touched. Translated blocks are counted as a whole when they are entered; a system call ends
 * a block, so the count is exact there. It is meant for programs of one thread: two threads would race.
 *
 * Debian ships no header of the plugin interface, so the few functions of it are declared here, as
 * https://www.qemu.org/docs/master/devel/tcg-plugins.html describes them. */
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
typedef void (*translated)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*called)(qemu_plugin_id_t, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                       uint64_t, uint64_t);
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, translated);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, called);

enum { ADD_U64 = 0, ASK = 0x5EED };

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

static uint64_t executed;

static void count(qemu_plugin_id_t id, struct qemu_plugin_tb *block)
{
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &executed, qemu_plugin_tb_n_insns(block));
}

static void answer(qemu_plugin_id_t id, unsigned cpu, int64_t number, uint64_t descriptor, uint64_t b, uint64_t c,
                   uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h)
{
    (void)id, (void)cpu, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
    if (number == ASK && write((int)descriptor, &executed, sizeof executed) < 0) {
        /* nobody reads there: the program sees that no answer came */
    }
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc,
                                                               char **argv)
{
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, count);
    qemu_plugin_register_vcpu_syscall_cb(id, answer);
    return 0;
}
