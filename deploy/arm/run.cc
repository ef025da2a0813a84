// edgeprune-run: run, time and check the model of the bundle this program lies in, on the device it was made for.
// Needs the C library and nothing else, but for a bundle without engine.so: its model is run by the ONNX Runtime that lies
// in device/lib, which needs the C++ library as well.
//
//   device/bin/edgeprune-run --input [NAME=]x.npy [--output [NAME=]y.npy]   answers for every row of x.npy
//   device/bin/edgeprune-run --bench [--seconds 3] [--cpu N]                milliseconds on this device, now
//   device/bin/edgeprune-run --selftest                                     every digest, and the recorded answers
//
// Each takes --json. Exit codes: 0 done; 1 the answers are not the recorded ones; 2 the request cannot be carried out as
// written; 4 the bundle is damaged; 70 a bug of this program.
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "bundle.h"
#include "counter.h"
#include "engine.h"
#include "json.h"
#include "kernel_errors.h"
#include "npy.h"
#include "onnxruntime.h"
#include "timing.h"

namespace edgeprune {

constexpr size_t kRowsShown = 8, kCleanCallsNeeded = 20;
constexpr double kWarmUpS = 0.25;
constexpr int kWarmUpCalls = 5;
constexpr const char* kEngine = "device/engine.so";
constexpr const char* kModel = "model.onnx";

struct Request {
  std::string verb;
  std::vector<std::string> inputs, outputs;
  double seconds = 3;
  int cpu = -1;
  bool json = false;
};

struct Report {
  std::string data, sentence;         // as JSON, and for people
  std::vector<std::string> warnings;  // what + next step, as JSON objects
  std::vector<std::string> said;      // the same for people
};

// --- words for people and programs

std::string told(const Stop& stop) {
  const std::string text = stop.what + (stop.why.empty() ? "" : ": " + stop.why);
  return text + (stop.next_step.empty() ? "" : "\n  next: " + stop.next_step);
}

std::string diagnostic(const std::string& kind, const std::string& blame, const Stop& stop) {
  return json::Object()
      .add("kind", kind)
      .add("blame", blame)
      .add("what", stop.what)
      .add("why", stop.why)
      .add("next", stop.next_step)
      .text();
}

void warn(Report& report, const std::string& what, const std::string& next_step) {
  const Stop stop{0, what, next_step, ""};
  report.warnings.push_back(diagnostic("Warning", "", stop));
  report.said.push_back(told(stop));
}

void envelope(const std::string& command, const char* status, const std::string& data,
              const std::vector<std::string>& diagnostics) {
  const std::string listed = json::array(diagnostics, [](const std::string& each) { return each; });
  puts(json::Object()
           .add("version", EDGEPRUNE_BOARD_VERSION)
           .add("command", command)
           .add("status", status)
           .raw("data", data)
           .raw("diagnostics", listed)
           .text()
           .c_str());
}

int failed(const Request& request, const Stop& stop) {
  const char* kind = stop.code == kWrongAnswer    ? "ParityFailed"
                     : stop.code == kWrongRequest ? "UserError"
                     : stop.code == kDamaged      ? "BundleError"
                                                  : "EdgepruneError";
  const char* blame = stop.code == kWrongAnswer    ? "result"
                      : stop.code == kWrongRequest ? "user"
                      : stop.code == kDamaged      ? "artifact"
                                                   : "bug";
  if (request.json) {
    envelope(request.verb, "error", "null", {diagnostic(kind, blame, stop)});
  } else {
    fprintf(stderr, "%s\n", told(stop).c_str());
  }
  return stop.code;
}

// --- the bundle and its engine

std::string folder_of_this_program() {
  char path[PATH_MAX];
  const ssize_t count = readlink("/proc/self/exe", path, sizeof path);
  std::string place(path, count > 0 ? static_cast<size_t>(count) : 0);
  for (int up = 0; up < 3; ++up) place = place.substr(0, std::min(place.rfind('/'), place.size()));
  return place;
}

// The engine of the bundle once its digest holds, its ports compared with what the manifest says of the model.
class Model {
 public:
  explicit Model(const Bundle& bundle) : bundle_(bundle) {
    try {
      engine_ = opened(bundle);
    } catch (const Refusal& error) {
      const bool wrong_machine = error.kind() == "architecture" || error.kind() == "runtime";
      throw Stop{wrong_machine ? kWrongRequest : kDamaged, error.what(),
                 wrong_machine ? "run it on the device it was made for" : kCopyAgain, ""};
    }
    compare("inputs", engine_->inputs());
    compare("outputs", engine_->outputs());
  }

  const Runnable& engine() const { return *engine_; }
  std::string runtime() const {
    return "edgeprune-run " EDGEPRUNE_BOARD_VERSION +
           (bundle_.lists(kEngine) ? "" : ", onnxruntime " + ort::Api::found());
  }
  const std::vector<Port>& inputs() const { return engine_->inputs(); }
  const std::vector<Port>& outputs() const { return engine_->outputs(); }
  const DLTensor& tensor(const Port& port) const { return engine_->tensor(port); }

  // Names are percent-encoded in the engine; the manifest has them as they are, in the same order.
  const std::string& name(const char* side, size_t place) const {
    const json::Value& ports = Bundle::member(Bundle::member(bundle_.manifest(), "signature"), side);
    return Bundle::text(ports.items[place], "name");
  }

  void run() const {
    try {
      engine_->run();
    } catch (const Refusal& error) {
      throw Stop{kWrongRequest, "the engine does not run here", "compile the model for this device", error.what()};
    }
  }

 private:
  // The engine that was compiled for the device, or the model itself where ONNX Runtime was found faster there.
  static std::unique_ptr<Runnable> opened(const Bundle& bundle) {
    if (bundle.lists(kEngine)) {
      bundle.checked(kEngine);
      return std::make_unique<Engine>(bundle.folder() + "/" + kEngine, kEngine);
    }
    const std::string content = bundle.checked(kModel);
    for (const std::string& library : bundle.listed("device/lib/")) bundle.checked(library);
    return std::make_unique<OnnxEngine>(content, kModel);
  }

  void compare(const char* side, const std::vector<Port>& ports) const {
    const auto& listed = Bundle::member(Bundle::member(bundle_.manifest(), "signature"), side).items;
    if (listed.size() != ports.size()) throw Stop{kDamaged, "the engine is of another model", kCopyAgain, ""};
  }

  const Bundle& bundle_;
  std::unique_ptr<Runnable> engine_;
};

std::vector<int64_t> shape_of(const DLTensor& tensor) { return {tensor.shape, tensor.shape + tensor.ndim}; }

// --- numbers

double half(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const double fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? ldexp(1 + fraction / 1024, exponent - 15) : ldexp(fraction / 1024, -14));
}

template <typename T>
double as(const char* data) {
  T value;
  memcpy(&value, data, sizeof value);
  return static_cast<double>(value);
}

double element(const Array& array, size_t place) {
  const char* data = array.content.data();
  if (array.dtype == "float32") return as<float>(data + 4 * place);
  if (array.dtype == "float64") return as<double>(data + 8 * place);
  if (array.dtype == "int64") return as<int64_t>(data + 8 * place);
  if (array.dtype == "int32") return as<int32_t>(data + 4 * place);
  if (array.dtype == "int8") return as<int8_t>(data + place);
  if (array.dtype == "float16") {
    uint16_t bits;
    memcpy(&bits, data + 2 * place, sizeof bits);
    return half(bits);
  }
  return as<uint8_t>(data + place);
}

size_t count_of(const std::vector<int64_t>& shape) {
  size_t count = 1;
  for (const int64_t size : shape) count *= static_cast<size_t>(size);
  return count;
}

// The first row that holds NaN or infinity, -1 if none does.
int64_t strange_row(const Array& array) {
  const size_t count = count_of(array.shape), rows = array.shape.empty() ? 1 : static_cast<size_t>(array.shape[0]);
  for (size_t place = 0; place < count; ++place) {
    if (!std::isfinite(element(array, place))) return static_cast<int64_t>(place / (count / rows));
  }
  return -1;
}

std::string spelled(const Array& array, size_t axis, size_t& place) {
  if (axis == array.shape.size()) {
    const double value = element(array, place++);
    char text[32];
    snprintf(text, sizeof text, array.dtype == "float64" ? "%.17g" : "%.9g", value);
    return std::isfinite(value) ? text : "null";
  }
  std::string out = "[";
  for (int64_t each = 0; each < array.shape[axis]; ++each) {
    out += (each ? ", " : "") + spelled(array, axis + 1, place);
  }
  return out + "]";
}

// --- the three verbs

// "NAME=FILE" or, with one port, "FILE".
std::vector<std::string> files_of(const std::vector<std::string>& words, const std::vector<std::string>& names,
                                  const char* option) {
  std::vector<std::string> files(names.size());
  bool clear = words.size() == names.size();
  for (const std::string& word : words) {
    size_t which = names.size() == 1 ? 0 : names.size();
    std::string file = word;
    for (size_t place = 0; place < names.size(); ++place) {
      if (word.rfind(names[place] + "=", 0) != 0) continue;
      which = place;
      file = word.substr(names[place].size() + 1);
    }
    clear = clear && which < names.size() && files[which].empty() && !file.empty();
    if (clear) files[which] = file;
  }
  if (!clear) {
    std::string wanted;
    for (const std::string& name : names) wanted += std::string(wanted.empty() ? "" : " ") + option + " " + name + "=FILE";
    throw Stop{kWrongRequest, std::string(option) + " does not name each port once", wanted, ""};
  }
  return files;
}

std::vector<std::string> names_of(const Model& model, const char* side, size_t count) {
  std::vector<std::string> names;
  for (size_t place = 0; place < count; ++place) names.push_back(model.name(side, place));
  return names;
}

Array read_array(const std::string& path) {
  std::string content, wrong;
  Array array;
  try {
    content = read_file(path);
  } catch (const Refusal& error) {
    throw Stop{kWrongRequest, error.what(), "give a .npy file", ""};
  }
  if (!(wrong = read_npy(content, array)).empty()) {
    throw Stop{kWrongRequest, path + ": " + wrong, "numpy.save(name, array)", ""};
  }
  return array;
}

// Checks rows given for a port, and returns how many calls they make.
size_t calls_in(const Array& given, const DLTensor& port, const std::string& name) {
  std::vector<int64_t> wanted = shape_of(port), had = given.shape;
  const int64_t batch = wanted.empty() ? 1 : wanted[0];
  const bool rows = !had.empty() && had.size() == wanted.size() && had[0] > 0;
  if (rows) had[0] = wanted[0];
  if (!rows || had != wanted) {
    throw Stop{kWrongRequest, "input '" + name + "' is " + shown(given.shape) + ", rows of " + shown(wanted) + " are wanted",
               "give it that shape", ""};
  }
  if (given.dtype != type_name(port.dtype)) {
    throw Stop{kWrongRequest, "input '" + name + "' is " + given.dtype + ", " + type_name(port.dtype) + " is wanted",
               std::string("x.astype('") + type_name(port.dtype) + "')", ""};
  }
  if (given.shape[0] % batch) {
    throw Stop{kWrongRequest, "input '" + name + "' has " + std::to_string(given.shape[0]) + " rows",
               "a multiple of " + std::to_string(batch), ""};
  }
  const int64_t strange = strange_row(given);
  if (strange >= 0) {
    throw Stop{kWrongRequest, "input '" + name + "' holds NaN or infinity, first in row " + std::to_string(strange),
               "give finite numbers; numpy.isfinite(x) finds the others", ""};
  }
  return static_cast<size_t>(given.shape[0] / batch);
}

// Runs the engine once for each of `calls` parts of the inputs; returns the outputs, joined along the batch.
std::vector<Array> answers(const Model& model, const std::vector<Array>& given, size_t calls) {
  std::vector<Array> out;
  for (const Port& port : model.outputs()) {
    const DLTensor& tensor = model.tensor(port);
    out.push_back({type_name(tensor.dtype), shape_of(tensor), ""});
    if (!out.back().shape.empty()) out.back().shape[0] *= static_cast<int64_t>(calls);
  }
  for (size_t call = 0; call < calls; ++call) {
    for (size_t place = 0; place < given.size(); ++place) {
      const DLTensor& tensor = model.tensor(model.inputs()[place]);
      memcpy(tensor.data, given[place].content.data() + call * bytes_of(tensor), bytes_of(tensor));
    }
    model.run();
    for (size_t place = 0; place < out.size(); ++place) {
      const DLTensor& tensor = model.tensor(model.outputs()[place]);
      out[place].content.append(static_cast<const char*>(tensor.data), bytes_of(tensor));
    }
  }
  return out;
}

void check_place(const std::string& place, const Bundle& bundle) {
  char folder[PATH_MAX], own[PATH_MAX];
  const size_t slash = place.rfind('/');
  const std::string parent = slash == std::string::npos ? "." : place.substr(0, slash + 1);
  if (place.size() < 4 || place.compare(place.size() - 4, 4, ".npy") != 0) {
    throw Stop{kWrongRequest, "--output " + place + " is no .npy", "", ""};
  }
  if (!realpath(parent.c_str(), folder) || !realpath(bundle.folder().c_str(), own)) {
    throw Stop{kWrongRequest, place + ": " + strerror(errno), "choose another --output", ""};
  }
  if ((std::string(folder) + "/").rfind(std::string(own) + "/", 0) == 0) {
    throw Stop{kWrongRequest, "--output " + place + " lies inside the bundle, which holds only what its manifest lists",
               "write it elsewhere, for example --output /tmp/y.npy", ""};
  }
}

void write_array(const std::string& place, const Array& array) {
  const std::string part = place + ".part", content = npy(array);
  FILE* file = fopen(part.c_str(), "wb");
  const bool written = file && fwrite(content.data(), 1, content.size(), file) == content.size();
  const bool closed = file && fclose(file) == 0;
  if (!written || !closed || rename(part.c_str(), place.c_str())) {
    const std::string why = strerror(errno);
    remove(part.c_str());
    throw Stop{kWrongRequest, place + ": " + why, "choose another --output", ""};
  }
}

std::string output_line(const std::string& name, const Array& array, bool values) {
  std::string text = name + ": " + array.dtype + " " + shown(array.shape);
  if (!values || array.shape.empty()) return text;
  const auto rows = static_cast<size_t>(array.shape[0]);
  size_t place = 0;
  for (size_t row = 0; row < std::min(rows, kRowsShown); ++row) text += "\n" + spelled(array, 1, place);
  if (rows > kRowsShown) text += "\n... " + std::to_string(rows - kRowsShown) + " more rows; --output FILE takes them all";
  return text;
}

Report run(const Request& request) {
  const Bundle bundle(folder_of_this_program());
  for (const std::string& each : request.outputs) {
    check_place(each.substr(each.find('=') == std::string::npos ? 0 : each.find('=') + 1), bundle);
  }
  const Model model(bundle);
  const auto input_names = names_of(model, "inputs", model.inputs().size());
  const auto output_names = names_of(model, "outputs", model.outputs().size());
  std::vector<Array> given;
  size_t calls = 0;
  for (const std::string& file : files_of(request.inputs, input_names, "--input")) {
    const Port& port = model.inputs()[given.size()];
    given.push_back(read_array(file));
    const size_t own = calls_in(given.back(), model.tensor(port), input_names[given.size() - 1]);
    if (calls && own != calls) throw Stop{kWrongRequest, "the inputs have different numbers of rows", "", ""};
    calls = own;
  }
  std::vector<std::string> places;
  if (!request.outputs.empty()) places = files_of(request.outputs, output_names, "--output");
  const std::vector<Array> out = answers(model, given, calls);
  Report report;
  json::Object outputs;
  for (size_t which = 0; which < out.size(); ++which) {
    if (!places.empty()) write_array(places[which], out[which]);
    json::Object facts;
    facts.add("dtype", out[which].dtype)
        .raw("shape", json::array(out[which].shape, [](int64_t size) { return std::to_string(size); }));
    size_t place = 0;
    if (places.empty()) facts.raw("values", spelled(out[which], 0, place));
    outputs.raw(output_names[which], facts.text());
    report.sentence += (which ? "\n" : "") + output_line(output_names[which], out[which], places.empty());
    if (!places.empty()) report.sentence += "\nwritten to " + places[which];
    const int64_t strange = strange_row(out[which]);
    if (strange >= 0) {
      warn(report, "output '" + output_names[which] + "' holds NaN or infinity, first in row " + std::to_string(strange),
           "scale the input as README.txt says; a model overflows on what it never saw");
    }
  }
  const std::string listed = json::array(places, [](const std::string& each) { return json::quoted(each); });
  report.data = json::Object().raw("outputs", outputs.text()).raw("output", places.empty() ? "null" : listed).text();
  return report;
}

std::vector<Array> recorded(const Bundle& bundle, const Model& model, const char* side, const std::vector<Port>& ports) {
  const auto samples = static_cast<int64_t>(Bundle::real(Bundle::member(bundle.manifest(), "parity"), "samples"));
  std::vector<Array> arrays;
  for (const Port& port : ports) {
    arrays.push_back(bundle.recorded(side, arrays.size()));
    std::vector<int64_t> wanted = shape_of(model.tensor(port));
    if (!wanted.empty()) wanted[0] *= samples;
    if (arrays.back().shape != wanted || arrays.back().dtype != type_name(model.tensor(port).dtype)) {
      throw Stop{kDamaged, "the engine and the recorded " + std::string(side) + "s are of different models", kCopyAgain, ""};
    }
  }
  return arrays;
}

size_t samples_of(const Bundle& bundle) {
  return static_cast<size_t>(Bundle::real(Bundle::member(bundle.manifest(), "parity"), "samples"));
}

double quantile(std::vector<double> sorted, double share) {  // linear between neighbours, as NumPy does by default
  std::sort(sorted.begin(), sorted.end());
  const double at = share * static_cast<double>(sorted.size() - 1);
  const auto low = static_cast<size_t>(at);
  const size_t high = std::min(low + 1, sorted.size() - 1);
  return sorted[low] + (at - static_cast<double>(low)) * (sorted[high] - sorted[low]);
}

// An emulator's clock says nothing; its counter says how many instructions one call takes.
Report count_instructions(const Model& model) {
  if (!counted()) {
    throw Stop{kWrongRequest, "this device is emulated, and the clock of an emulator says nothing",
               "run it on the device itself", ""};
  }
  const Counter counter;
  counter.count([&model] { model.run(); });
  const uint64_t first = counter.count([&model] { model.run(); }), second = counter.count([&model] { model.run(); });
  Report report;
  report.data = json::Object()
                    .add("metric", "emulated_instructions")
                    .add("emulated", true)
                    .raw("instructions", "[" + std::to_string(first) + "," + std::to_string(second) + "]")
                    .text();
  report.sentence = std::to_string(second) + " instructions, counted by an emulator; they are no time";
  return report;
}

Report bench(const Request& request) {
  const Bundle bundle(folder_of_this_program());
  const Model model(bundle);
  const std::vector<Array> inputs = recorded(bundle, model, "input", model.inputs());
  for (size_t place = 0; place < inputs.size(); ++place) {
    const DLTensor& tensor = model.tensor(model.inputs()[place]);
    memcpy(tensor.data, inputs[place].content.data(), bytes_of(tensor));
  }
  if (emulated()) return count_instructions(model);
  const int cpu = pin(request.cpu);
  const double warm = now_s() + kWarmUpS;
  for (int call = 0; call < kWarmUpCalls || now_s() < warm; ++call) model.run();
  std::vector<double> all, clean;
  const double end = now_s() + request.seconds;
  do {
    const Row row = timed(model.engine());
    all.push_back(static_cast<double>(row.wall_ns) / 1e6);
    if (!row.preempted) clean.push_back(all.back());
  } while (now_s() < end && all.size() < 10'000'000);
  const bool enough = clean.size() >= kCleanCallsNeeded;
  const std::vector<double>& kept = enough ? clean : all;
  const std::string counted = enough ? "calls that were never preempted" : "calls, preempted ones among them";
  const double p5 = quantile(kept, 0.05), p50 = quantile(kept, 0.5), p95 = quantile(kept, 0.95);
  Report report;
  report.data = json::Object()
                    .add("p5_ms", p5)
                    .add("p50_ms", p50)
                    .add("p95_ms", p95)
                    .add("calls", all.size())
                    .add("clean_calls", kept.size())
                    .add("counted", counted)
                    .add("threads", 1)
                    .add("cpu", cpu)
                    .add("runtime", model.runtime())
                    .text();
  char sentence[320];
  snprintf(sentence, sizeof sentence,
           "%.3f ms median (%.3f to %.3f, 5 to 95 %% of %zu %s), %zu calls, 1 thread on CPU %d, %s", p50, p5,
           p95, kept.size(), counted.c_str(), all.size(), cpu, model.runtime().c_str());
  report.sentence = sentence;
  warn(report, "absolute milliseconds of this machine under its load of now; they drift by several per cent",
       "for a ratio you can rely on: edgeprune measure this.onnx other.onnx");
  return report;
}

// The largest |got - wanted| as a share of what is tolerated.
double excess(const Array& got, const Array& wanted, double atol, double rtol) {
  double worst = 0;
  const size_t count = count_of(wanted.shape);
  for (size_t place = 0; place < count; ++place) {
    const double mine = element(got, place), theirs = element(wanted, place);
    if (mine == theirs) continue;
    const double share = std::abs(mine - theirs) / (atol + rtol * std::abs(theirs));
    worst = std::isnan(share) ? INFINITY : std::max(worst, share);
  }
  return worst;
}

Report selftest(const Request&) {
  const Bundle bundle(folder_of_this_program());
  bundle.check_all();
  const Model model(bundle);
  const json::Value& parity = Bundle::member(bundle.manifest(), "parity");
  const size_t samples = samples_of(bundle);
  const std::vector<Array> got = answers(model, recorded(bundle, model, "input", model.inputs()), samples);
  const std::vector<Array> wanted = recorded(bundle, model, "output", model.outputs());
  double worst = 0;
  for (size_t place = 0; place < got.size(); ++place) {
    worst = std::max(worst, excess(got[place], wanted[place], Bundle::real(parity, "atol"), Bundle::real(parity, "rtol")));
  }
  if (!(worst <= 1)) {
    char what[160];
    snprintf(what, sizeof what, "an answer is off by %.3g times what is tolerated", worst);
    throw Stop{kWrongAnswer, what, "this device computes something else; compile the model for it again", ""};
  }
  const std::string name = Bundle::text(bundle.manifest(), "name");
  Report report;
  report.data = json::Object()
                    .add("name", name)
                    .add("files", bundle.files())
                    .add("samples", samples)
                    .add("worst_of_tolerance", worst)
                    .text();
  report.sentence = name + ": " + std::to_string(bundle.files()) + " files whole, " + std::to_string(samples) +
                    " recorded samples answered within tolerance";
  return report;
}

// --- the command line

[[noreturn]] void wrong_usage(const std::string& why) {
  throw Stop{kWrongRequest, why, "edgeprune-run --input FILE | --bench | --selftest, see device/README.txt", ""};
}

double positive(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const double value = strtod(text.c_str(), &end);
  if (text.empty() || *end || !(value > 0) || value > 1e6) wrong_usage(option + " wants a number above 0");
  return value;
}

void read_option(Request& request, const std::string& option, const std::string& value) {
  if (option == "--input") {
    request.verb = "run";
    request.inputs.push_back(value);
  } else if (option == "--output") {
    request.outputs.push_back(value);
  } else if (option == "--seconds") {
    request.seconds = positive(option, value);
  } else if (option == "--cpu") {
    request.cpu = value == "0" ? 0 : static_cast<int>(positive(option, value));
  } else if (option == "--threads") {
    if (positive(option, value) != 1) wrong_usage("the engine runs on one thread");
  } else {
    wrong_usage("unknown option " + option);
  }
}

void read_request(Request& request, int count, char** words) {
  int verbs = 0;
  for (int place = 1; place < count; ++place) {
    const std::string option = words[place];
    if (option == "--json") {
      request.json = true;
    } else if (option == "--bench" || option == "--selftest") {
      request.verb = option.substr(2);
      ++verbs;
    } else {
      if (place + 1 == count) wrong_usage(option + " wants a value, or is unknown");
      read_option(request, option, words[++place]);
    }
  }
  verbs += !request.inputs.empty();
  if (verbs != 1) wrong_usage("one of --input, --bench and --selftest is wanted");
  if (!request.outputs.empty() && request.inputs.empty()) wrong_usage("--output goes with --input");
}

}  // namespace edgeprune

int main(int count, char** words) {
  using namespace edgeprune;
  Request request;
  try {
    read_request(request, count, words);
    const Report report = request.verb == "bench" ? bench(request) : request.verb == "selftest" ? selftest(request) : run(request);
    if (request.json) {
      envelope(request.verb, "ok", report.data, report.warnings);
    } else {
      puts(report.sentence.c_str());
      for (const std::string& each : report.said) fprintf(stderr, "%s\n", each.c_str());
    }
    return 0;
  } catch (const Stop& stop) {
    return failed(request, stop);
  } catch (const Refusal& error) {
    return failed(request, {kWrongRequest, error.what(), "", ""});
  } catch (const std::exception& error) {
    return failed(request, {kBug, "edgeprune-run has a bug", "", error.what()});
  }
}
