/* A stand-in for NVIDIA's libnvidia-ml.so.1: boards whose true power is known at every instant, behind NVML's own functions.

   The one idea: nothing is stored but the waveform. A reading is computed, when it is asked for, from the closed-form
   integral of the waveform and the sensor's window and update period, so that each has an exact truth. Instants are
   CLOCK_MONOTONIC, which all processes of a machine share: boards of one description are one board in all of them.

   The description is a text of lines (see `parse`), given by fake_nvml_configure() or in the file that FAKE_NVML names; that
   file is read at nvmlInit and again whenever it was replaced. Own control functions begin with fake_nvml_.

   Not covered: the driver's lock, which lets one slow call delay another; sensors that drift; everything that sets. */

#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef long long i64;
typedef unsigned long long u64;
typedef int Ret;
typedef void *Handle;

enum {
    SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, ALREADY, NOT_FOUND, INSUFFICIENT_SIZE,
    DRIVER_NOT_LOADED = 9, VERSION_MISMATCH = 25
};

/* ---------------------------------------------------------------- structures of NVML, as in its public interface */

typedef union {
    double dVal; unsigned uiVal; unsigned long ulVal; u64 ullVal; i64 sllVal; int siVal; unsigned short usVal;
} Value;
typedef struct { u64 timeStamp; Value sampleValue; } Sample;
typedef struct { unsigned fieldId, scopeId; i64 timestamp, latencyUsec; unsigned valueType, nvmlReturn; Value value; } Field;
typedef struct {
    char busIdLegacy[16];
    unsigned domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} Pci;
typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned version; u64 total, reserved, free, used; } Memory2;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned version, sensorType; int temperature; } Temperature;
typedef struct { unsigned pid; u64 usedGpuMemory; unsigned gpuInstanceId, computeInstanceId; } Process;
typedef struct {
    unsigned multiprocessorCount, sharedCopyEngineCount, sharedDecoderCount, sharedEncoderCount, sharedJpegCount,
        sharedOfaCount, gpuInstanceSliceCount, computeInstanceSliceCount;
    u64 memorySizeMB;
} Attributes;
typedef struct { unsigned isC2cEnabled; } C2c;

/* For a test that compares these with nvidia-ml-py's: "structure field offset", and "structure size" lines. */
const char *fake_nvml_layout(void) {
    static char text[8192];
    char *at = text;
#define S(type, name) at += sprintf(at, "%s . %zu\n", name, sizeof(type));
#define F(type, name, field) at += sprintf(at, "%s %s %zu\n", name, #field, offsetof(type, field));
    S(Value, "c_nvmlValue_t") S(Sample, "c_nvmlSample_t") S(Field, "c_nvmlFieldValue_t") S(Pci, "nvmlPciInfo_t")
    S(Memory, "c_nvmlMemory_t") S(Memory2, "c_nvmlMemory_v2_t") S(Utilization, "c_nvmlUtilization_t")
    S(Temperature, "c_nvmlTemperature_v1_t") S(Process, "c_nvmlProcessInfo_t") S(Attributes, "c_nvmlDeviceAttributes")
    S(C2c, "c_nvmlC2cModeInfo_v1_t")
    F(Sample, "c_nvmlSample_t", timeStamp) F(Sample, "c_nvmlSample_t", sampleValue)
    F(Field, "c_nvmlFieldValue_t", fieldId) F(Field, "c_nvmlFieldValue_t", scopeId) F(Field, "c_nvmlFieldValue_t", timestamp)
    F(Field, "c_nvmlFieldValue_t", latencyUsec) F(Field, "c_nvmlFieldValue_t", valueType)
    F(Field, "c_nvmlFieldValue_t", nvmlReturn) F(Field, "c_nvmlFieldValue_t", value)
    F(Pci, "nvmlPciInfo_t", busIdLegacy) F(Pci, "nvmlPciInfo_t", domain) F(Pci, "nvmlPciInfo_t", bus)
    F(Pci, "nvmlPciInfo_t", device) F(Pci, "nvmlPciInfo_t", pciDeviceId) F(Pci, "nvmlPciInfo_t", pciSubSystemId)
    F(Pci, "nvmlPciInfo_t", busId)
    F(Memory, "c_nvmlMemory_t", total) F(Memory, "c_nvmlMemory_t", free) F(Memory, "c_nvmlMemory_t", used)
    F(Memory2, "c_nvmlMemory_v2_t", version) F(Memory2, "c_nvmlMemory_v2_t", total) F(Memory2, "c_nvmlMemory_v2_t", reserved)
    F(Memory2, "c_nvmlMemory_v2_t", free) F(Memory2, "c_nvmlMemory_v2_t", used)
    F(Utilization, "c_nvmlUtilization_t", gpu) F(Utilization, "c_nvmlUtilization_t", memory)
    F(Temperature, "c_nvmlTemperature_v1_t", version) F(Temperature, "c_nvmlTemperature_v1_t", sensorType)
    F(Temperature, "c_nvmlTemperature_v1_t", temperature)
    F(Process, "c_nvmlProcessInfo_t", pid) F(Process, "c_nvmlProcessInfo_t", usedGpuMemory)
    F(Process, "c_nvmlProcessInfo_t", gpuInstanceId) F(Process, "c_nvmlProcessInfo_t", computeInstanceId)
    F(Attributes, "c_nvmlDeviceAttributes", multiprocessorCount) F(Attributes, "c_nvmlDeviceAttributes", gpuInstanceSliceCount)
    F(Attributes, "c_nvmlDeviceAttributes", computeInstanceSliceCount) F(Attributes, "c_nvmlDeviceAttributes", memorySizeMB)
#undef S
#undef F
    return text;
}

/* ---------------------------------------------------------------- boards */

enum { MAX_BOARDS = 16, MAX_STEPS = 32, MAX_FAULTS = 64, MAX_MIGS = 8, MAX_PROCESSES = 16, MAX_LATENCIES = 32 };
enum Shape { CONST, SQUARE, SINE, STEPS };

/* From `from` (ns) on, until the next wave: CONST a; SQUARE b for `high` ns of each period, else a; SINE a + b sin(); STEPS. */
typedef struct {
    i64 from, period, phase, high, step_ns[MAX_STEPS];
    double a, b, step_w[MAX_STEPS], before_j;
    int shape, steps;
} Wave;
typedef struct { char kind[24], function[64]; i64 from, to; u64 value; } Fault;
typedef struct { char uuid[96]; i64 gi, ci, slices; u64 memory; } Mig;
typedef struct { char kind; i64 pid; u64 memory; } Proc;
typedef struct { char function[64]; int spins; double least, idle, idle_most, busy, busy_most; } Latency;

typedef struct {
    char name[96], uuid[96], pci[32], serial[32];
    i64 arch, cc_major, cc_minor, brand, persistence, compute_mode, virtualization, limit_mw, default_limit_mw, min_limit_mw,
        max_limit_mw, enforced_limit_mw, temperature_c, memory_temperature_c, utilization, memory_utilization, graphics_mhz,
        sm_mhz, memory_mhz, video_mhz, max_sm_mhz, max_memory_mhz, memory_total, memory_used, memory_reserved, reasons,
        pcie_gen, pcie_width, nvlinks, fan, pstate, c2c, mig_mode, max_migs, has_counter, counter_ns, counter_phase_ns,
        counter_jitter_ns, resolution_mj, start_mj, instant_window_ns, instant_ns, instant_phase_ns, average_window_ns,
        average_ns, average_phase_ns, usage, module_scope, sample_ns, sample_window_ns, sample_phase_ns, sample_count,
        sample_delay_ns, busy_mw, seed;
    double counter_gain, power_gain, power_offset_w, memory_share;
    Wave *waves;
    Fault faults[MAX_FAULTS];
    Mig migs[MAX_MIGS];
    Proc processes[MAX_PROCESSES];
    Latency latencies[MAX_LATENCIES];
    int wave_count, fault_count, mig_count, process_count, latency_count, index;
} Board;

typedef struct {
    Board *boards;
    char driver[80], nvml[80];
    i64 count, cuda, init_error, wall_ns, topology, read_at_permille;
} Machine;

static Machine machine;
static int sessions, configured, from_environment;
static struct stat environment_file;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static i64 (*clock_now)(void);
static void (*clock_sleep)(double);
static i64 fixed_now = -1, real_wall_offset;
static struct { const char *name; u64 count; } calls[256];
static u64 randomness = 88172645463325252ull;

/* ---------------------------------------------------------------- time */

static i64 read_clock(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static int time_is_fake(void) { return clock_now != NULL || fixed_now >= 0; }

i64 fake_nvml_now_ns(void) { return clock_now ? clock_now() : fixed_now >= 0 ? fixed_now : read_clock(CLOCK_MONOTONIC); }

/* Wall clock minus the clock of the waveforms, ns: power samples are stamped with the former. */
i64 fake_nvml_wall_offset_ns(void) { return time_is_fake() ? machine.wall_ns : real_wall_offset; }

static void pause_for(double seconds, int spins) {
    if (seconds <= 0) return;
    if (time_is_fake()) {
        if (clock_sleep) clock_sleep(seconds);
        else if (!clock_now) fixed_now += llround(seconds * 1e9);
        return;
    }
    i64 until = read_clock(CLOCK_MONOTONIC) + llround(seconds * 1e9);
    struct timespec at = {until / 1000000000ll, until % 1000000000ll};
    if (spins) while (read_clock(CLOCK_MONOTONIC) < until) continue;
    else while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) != 0) continue;
}

/* ---------------------------------------------------------------- the truth: closed-form integrals */

static i64 floor_div(i64 a, i64 b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

static double wave_power_w(const Wave *w, i64 t) {
    if (w->shape == CONST) return w->a;
    i64 rest = t - w->phase - floor_div(t - w->phase, w->period) * w->period;
    if (w->shape == SQUARE) return rest < w->high ? w->b : w->a;
    if (w->shape == SINE) return w->a + w->b * sin(2 * M_PI * (double)rest / (double)w->period);
    int i = 0;
    while (i < w->steps - 1 && rest >= w->step_ns[i]) rest -= w->step_ns[i++];
    return w->step_w[i];
}

/* Joules of the wave from its phase to t. */
static double wave_primitive_j(const Wave *w, i64 t) {
    if (w->shape == CONST) return w->a * 1e-9 * (double)t;
    i64 local = t - w->phase, cycles = floor_div(local, w->period), rest = local - cycles * w->period;
    if (w->shape == SINE)
        return w->a * 1e-9 * (double)local
            + w->b * 1e-9 * (double)w->period / (2 * M_PI) * (1 - cos(2 * M_PI * (double)rest / (double)w->period));
    double cycle = 0, part = 0;
    if (w->shape == SQUARE) {
        i64 high = rest < w->high ? rest : w->high;
        cycle = w->a * (double)(w->period - w->high) + w->b * (double)w->high;
        part = w->b * (double)high + w->a * (double)(rest - high);
    } else {
        for (int i = 0; i < w->steps; i++) {
            i64 spent = rest < w->step_ns[i] ? rest : w->step_ns[i];
            cycle += w->step_w[i] * (double)w->step_ns[i];
            part += w->step_w[i] * (double)spent;
            rest -= spent;
        }
    }
    return 1e-9 * (cycle * (double)cycles + part);
}

static const Wave *wave_at(const Board *b, i64 t) {
    int k = b->wave_count - 1;
    while (k > 0 && b->waves[k].from > t) k--;
    return &b->waves[k];
}

/* Joules from the clock's zero to t. */
static double total_j(const Board *b, i64 t) {
    const Wave *w = wave_at(b, t);
    return w->before_j + wave_primitive_j(w, t) - wave_primitive_j(w, w == b->waves ? 0 : w->from);
}

static double mean_w(const Board *b, i64 t0, i64 t1) {
    return t1 > t0 ? (total_j(b, t1) - total_j(b, t0)) / (1e-9 * (double)(t1 - t0)) : wave_power_w(wave_at(b, t1), t1);
}

/* ---------------------------------------------------------------- sensors */

static double unit_random(u64 seed, u64 k) { /* splitmix64, in (-1, 1) */
    u64 z = seed * 0x9e3779b97f4a7c15ull + k + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (double)(i64)((z ^ (z >> 31)) >> 1) / 4611686018427387904.0 - 1;
}

static i64 last_refresh_ns(const Board *b, i64 t) {
    if (b->counter_ns <= 0) return t;
    for (i64 k = floor_div(t - b->counter_phase_ns, b->counter_ns) + 1;; k--) {
        i64 at = b->counter_phase_ns + k * b->counter_ns
            + llround((double)b->counter_jitter_ns * unit_random((u64)b->seed, (u64)k));
        if (at <= t) return at;
    }
}

/* The fault of this kind that holds at t; the latest one, so that a later fault of the same kind replaces an earlier one. */
static const Fault *fault_at(const Board *b, const char *kind, const char *function, i64 t) {
    for (int i = b->fault_count - 1; i >= 0; i--) {
        const Fault *f = &b->faults[i];
        if (strcmp(f->kind, kind) == 0 && f->from <= t && t < f->to
            && (!function || strcmp(f->function, function) == 0 || strcmp(f->function, "*") == 0))
            return f;
    }
    return NULL;
}

static u64 counter_mj(const Board *b, i64 t) {
    const Fault *f;
    if ((f = fault_at(b, "says", "counter", t))) return f->value;
    if ((f = fault_at(b, "frozen_counter", NULL, t))) t = f->from;
    i64 updated = last_refresh_ns(b, t), since = -1;
    double mj = (double)b->start_mj;
    if ((f = fault_at(b, "reset", NULL, t))) {
        since = f->from;
        mj = 1000 * b->counter_gain * (total_j(b, updated > since ? updated : since) - total_j(b, since));
    } else {
        mj += 1000 * b->counter_gain * total_j(b, updated);
    }
    for (int i = 0; i < b->fault_count; i++) {
        const Fault *back = &b->faults[i];
        if (strcmp(back->kind, "back") == 0 && since < back->from && back->from <= t && t < back->to) mj -= (double)back->value;
    }
    if ((f = fault_at(b, "wrap32", NULL, t))) {
        double at = (double)b->start_mj + 1000 * b->counter_gain * total_j(b, (i64)f->value);
        return (u64)(llround(mj) - llround(at)) & 0xffffffffull;
    }
    i64 step = b->resolution_mj > 0 ? b->resolution_mj : 1;
    return mj <= 0 ? 0 : (u64)(llround(mj / (double)step) * step);
}

static unsigned power_mw(const Board *b, i64 t, i64 window, i64 period, i64 phase, double share) {
    const Fault *f;
    if ((f = fault_at(b, "says", "power", t))) return (unsigned)f->value;
    if ((f = fault_at(b, "frozen_power", NULL, t))) t = f->from;
    if (period > 0) t = phase + floor_div(t - phase, period) * period;
    double watts = share * (b->power_gain * mean_w(b, t - window, t) + b->power_offset_w);
    return watts <= 0 ? 0 : (unsigned)llround(1000 * watts);
}

static unsigned instant_mw(const Board *b, i64 t) {
    return power_mw(b, t, b->instant_window_ns, b->instant_ns, b->instant_phase_ns, 1);
}

static unsigned average_mw(const Board *b, i64 t, double share) {
    return power_mw(b, t, b->average_window_ns, b->average_ns, b->average_phase_ns, share);
}

static int is_busy(const Board *b, i64 t) { return 1000 * wave_power_w(wave_at(b, t), t) > (double)b->busy_mw; }

/* ---------------------------------------------------------------- the description */

static const struct { const char *key; size_t at, size; char type; } KEYS[] = {
#define KEY(key, type) {#key, offsetof(Board, key), sizeof ((Board *)0)->key, type},
#define I(key) KEY(key, 'i')
#define D(key) KEY(key, 'd')
#define T(key) KEY(key, 't')
    I(arch) I(cc_major) I(cc_minor) I(brand) I(persistence) I(compute_mode) I(virtualization) I(limit_mw) I(default_limit_mw)
    I(min_limit_mw) I(max_limit_mw) I(enforced_limit_mw) I(temperature_c) I(memory_temperature_c) I(utilization)
    I(memory_utilization) I(graphics_mhz) I(sm_mhz) I(memory_mhz) I(video_mhz) I(max_sm_mhz) I(max_memory_mhz)
    I(memory_total) I(memory_used) I(memory_reserved) I(reasons) I(pcie_gen) I(pcie_width) I(nvlinks) I(fan) I(pstate) I(c2c)
    I(mig_mode) I(max_migs) I(has_counter) I(counter_ns) I(counter_phase_ns) I(counter_jitter_ns) I(resolution_mj)
    I(start_mj) I(instant_window_ns) I(instant_ns) I(instant_phase_ns) I(average_window_ns) I(average_ns) I(average_phase_ns)
    I(usage) I(module_scope) I(sample_ns) I(sample_window_ns) I(sample_phase_ns) I(sample_count) I(sample_delay_ns)
    I(busy_mw) I(seed) D(counter_gain) D(power_gain) D(power_offset_w) D(memory_share)
    T(name) T(uuid) T(pci) T(serial)
};

static int parse_wave(Board *b, const char *s) {
    Wave *grown = realloc(b->waves, sizeof(Wave) * (size_t)(b->wave_count + 1));
    if (!grown) return 0;
    b->waves = grown;
    Wave *w = &grown[b->wave_count];
    memset(w, 0, sizeof *w);
    char shape[16];
    int read = 0;
    if (sscanf(s, "%lld %15s %n", &w->from, shape, &read) != 2) return 0;
    s += read;
    if (strcmp(shape, "const") == 0) {
        if (sscanf(s, "%lf", &w->a) != 1) return 0;
    } else if (strcmp(shape, "square") == 0) { /* low W, high W, period, high ns, phase */
        w->shape = SQUARE;
        if (sscanf(s, "%lf %lf %lld %lld %lld", &w->a, &w->b, &w->period, &w->high, &w->phase) != 5) return 0;
    } else if (strcmp(shape, "sine") == 0) { /* mean W, amplitude W, period, phase */
        w->shape = SINE;
        if (sscanf(s, "%lf %lf %lld %lld", &w->a, &w->b, &w->period, &w->phase) != 4) return 0;
    } else if (strcmp(shape, "steps") == 0) { /* phase, then ns and W of each step */
        w->shape = STEPS;
        if (sscanf(s, "%lld %n", &w->phase, &read) != 1) return 0;
        for (s += read; w->steps < MAX_STEPS; w->steps++, s += read) {
            if (sscanf(s, "%lld %lf %n", &w->step_ns[w->steps], &w->step_w[w->steps], &read) != 2) break;
            w->period += w->step_ns[w->steps];
        }
        if (*s) return 0;
    } else return 0;
    if (w->shape != CONST && w->period <= 0) return 0;
    if (b->wave_count > 0) {
        if (w->from < w[-1].from) return 0;
        w->before_j = total_j(b, w->from);
    } else w->before_j = 0;
    b->wave_count++;
    return 1;
}

static int parse_list(Board *b, const char *key, const char *s) {
    if (strcmp(key, "wave") == 0) return parse_wave(b, s);
    if (strcmp(key, "fault") == 0) { /* kind, function or field:<id> or *, from, to, value */
        Fault *f = &b->faults[b->fault_count];
        return b->fault_count < MAX_FAULTS
            && sscanf(s, "%23s %63s %lld %lld %llu", f->kind, f->function, &f->from, &f->to, &f->value) == 5
            && ++b->fault_count;
    }
    if (strcmp(key, "mig") == 0) { /* uuid, GPU instance, compute instance, slices, bytes */
        Mig *m = &b->migs[b->mig_count];
        return b->mig_count < MAX_MIGS
            && sscanf(s, "%95s %lld %lld %lld %llu", m->uuid, &m->gi, &m->ci, &m->slices, &m->memory) == 5 && ++b->mig_count;
    }
    if (strcmp(key, "process") == 0) { /* C or G, pid, bytes */
        Proc *p = &b->processes[b->process_count];
        return b->process_count < MAX_PROCESSES && sscanf(s, "%c %lld %llu", &p->kind, &p->pid, &p->memory) == 3
            && ++b->process_count;
    }
    if (strcmp(key, "latency") == 0) { /* function or *, sleep or spin, then seconds: least; median, most idle; the same busy */
        Latency *l = &b->latencies[b->latency_count];
        char how[16];
        if (b->latency_count >= MAX_LATENCIES
            || sscanf(s, "%63s %15s %lf %lf %lf %lf %lf", l->function, how, &l->least, &l->idle, &l->idle_most, &l->busy,
                      &l->busy_most) != 7)
            return 0;
        l->spins = strcmp(how, "spin") == 0;
        return ++b->latency_count;
    }
    return 0;
}

static int parse_key(Board *b, const char *key, const char *s) {
    for (size_t i = 0; i < sizeof KEYS / sizeof *KEYS; i++) {
        if (strcmp(key, KEYS[i].key) != 0) continue;
        void *at = (char *)b + KEYS[i].at;
        if (KEYS[i].type == 't') return snprintf(at, KEYS[i].size, "%s", s) < (int)KEYS[i].size;
        return KEYS[i].type == 'i' ? sscanf(s, "%lld", (i64 *)at) == 1 : sscanf(s, "%lf", (double *)at) == 1;
    }
    return parse_list(b, key, s);
}

static int parse_machine(Machine *m, const char *key, const char *s) {
    if (strcmp(key, "driver") == 0) return snprintf(m->driver, sizeof m->driver, "%s", s) >= 0;
    if (strcmp(key, "nvml") == 0) return snprintf(m->nvml, sizeof m->nvml, "%s", s) >= 0;
    i64 *at = strcmp(key, "cuda") == 0 ? &m->cuda : strcmp(key, "init_error") == 0 ? &m->init_error
        : strcmp(key, "wall_ns") == 0 ? &m->wall_ns : strcmp(key, "topology") == 0 ? &m->topology
        : strcmp(key, "read_at_permille") == 0 ? &m->read_at_permille : NULL;
    return at && sscanf(s, "%lld", at) == 1;
}

static void discard(Machine *m) {
    for (i64 i = 0; m->boards && i < m->count; i++) free(m->boards[i].waves);
    free(m->boards);
}

/* "key value" lines; those before the first line "board" describe the machine. Returns 0, or the number of the bad line. */
static int parse(const char *text) {
    Machine m = {.boards = calloc(MAX_BOARDS, sizeof(Board)), .topology = 40, .read_at_permille = 500};
    m.wall_ns = 1700000000000000000ll;
    Board *b = NULL;
    int number = 0;
    while (text && *text) {
        char line[1024], key[32] = "";
        size_t length = strcspn(text, "\n");
        snprintf(line, sizeof line, "%.*s", (int)length, text);
        text += length + (text[length] == '\n');
        number++;
        int read = 0;
        if (sscanf(line, "%31s %n", key, &read) != 1 || key[0] == '#') continue;
        int good;
        if (strcmp(key, "board") == 0) {
            good = m.count < MAX_BOARDS;
            if (good) {
                b = &m.boards[m.count];
                b->index = (int)m.count++;
                b->counter_gain = b->power_gain = 1;
            }
        } else good = b ? parse_key(b, key, line + read) : parse_machine(&m, key, line + read);
        if (!good || length >= sizeof line) {
            discard(&m);
            return number;
        }
    }
    for (i64 i = 0; i < m.count; i++)
        if (m.boards[i].wave_count == 0) parse_wave(&m.boards[i], "0 const 0");
    discard(&machine);
    machine = m;
    configured = 1;
    real_wall_offset = read_clock(CLOCK_REALTIME) - read_clock(CLOCK_MONOTONIC);
    return 0;
}

static void read_environment(void) {
    const char *path = getenv("FAKE_NVML");
    struct stat now;
    if ((configured && !from_environment) || !path || stat(path, &now) != 0) return;
    if (from_environment && now.st_ino == environment_file.st_ino && now.st_mtim.tv_sec == environment_file.st_mtim.tv_sec
        && now.st_mtim.tv_nsec == environment_file.st_mtim.tv_nsec)
        return;
    FILE *file = fopen(path, "r");
    if (!file) return;
    char *text = calloc(1, (size_t)now.st_size + 1);
    int bad = !text || fread(text, 1, (size_t)now.st_size, file) != (size_t)now.st_size;
    fclose(file);
    int line = bad ? 0 : parse(text);
    if (bad || line) fprintf(stderr, "FAKE_NVML: %s: line %d is not understood\n", path, line);
    free(text);
    from_environment = 1;
    environment_file = now;
}

/* ---------------------------------------------------------------- control */

int fake_nvml_configure(const char *text) {
    pthread_mutex_lock(&lock);
    int bad = parse(text);
    if (!bad) from_environment = 0;
    pthread_mutex_unlock(&lock);
    return bad;
}

/* One more line for a board, such as the wave from now on, without reading the rest again. */
int fake_nvml_add(int board, const char *line) {
    char key[32] = "";
    int read = 0, good = 0;
    pthread_mutex_lock(&lock);
    if (board < machine.count && sscanf(line, "%31s %n", key, &read) == 1)
        good = parse_list(&machine.boards[board], key, line + read);
    pthread_mutex_unlock(&lock);
    return !good;
}

/* Forget everything: the library then behaves as if no driver were loaded. */
void fake_nvml_clear(void) {
    pthread_mutex_lock(&lock);
    discard(&machine);
    memset(&machine, 0, sizeof machine);
    sessions = configured = from_environment = 0;
    memset(calls, 0, sizeof calls);
    clock_now = NULL;
    clock_sleep = NULL;
    fixed_now = -1;
    pthread_mutex_unlock(&lock);
}

/* The clock to read instead of CLOCK_MONOTONIC, and how to let time pass on it; NULL for the real one. */
void fake_nvml_set_clock(i64 (*now)(void), void (*sleep)(double)) {
    clock_now = now;
    clock_sleep = sleep;
}

void fake_nvml_set_now_ns(i64 now) { fixed_now = now; }

int fake_nvml_sessions(void) { return sessions; }

void fake_nvml_clear_calls(void) { memset(calls, 0, sizeof calls); }

/* "function count" lines. */
int fake_nvml_calls(char *text, int size) {
    int used = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; calls[i].name && used < size; i++)
        used += snprintf(text + used, (size_t)(size - used), "%s %llu\n", calls[i].name, calls[i].count);
    pthread_mutex_unlock(&lock);
    return used < size;
}

double fake_nvml_energy_j(int board, i64 t0, i64 t1) {
    pthread_mutex_lock(&lock);
    double joules = board < machine.count ? total_j(&machine.boards[board], t1) - total_j(&machine.boards[board], t0) : NAN;
    pthread_mutex_unlock(&lock);
    return joules;
}

double fake_nvml_power_w(int board, i64 t) {
    pthread_mutex_lock(&lock);
    double watts = board < machine.count ? wave_power_w(wave_at(&machine.boards[board], t), t) : NAN;
    pthread_mutex_unlock(&lock);
    return watts;
}

/* ---------------------------------------------------------------- a call: count it, let it take its time, check its faults */

typedef struct { Board *board; int mig, spins; i64 t; double rest_s; Ret wrong; } Call;

static void count_call(const char *name) {
    int i = 0;
    while (i < 255 && calls[i].name && strcmp(calls[i].name, name) != 0) i++;
    calls[i].name = name;
    calls[i].count++;
}

static double uniform(void) {
    randomness ^= randomness << 13;
    randomness ^= randomness >> 7;
    randomness ^= randomness << 17;
    return (double)(randomness >> 11) / 9007199254740992.0;
}

/* Half of the calls are evenly spread below the median, half above, thinning out towards the longest. */
static double draw(double least, double middle, double most) {
    double u = uniform();
    return u < 0.5 ? least + 2 * u * (middle - least) : middle + (most - middle) * pow(2 * u - 1, 3);
}

static double latency_s(const Board *b, const char *function, i64 t, int *spins) {
    double seconds = 0;
    for (int i = 0; !time_is_fake() && i < b->latency_count; i++) { /* the first that fits; "*" comes last */
        const Latency *l = &b->latencies[i];
        if (strcmp(l->function, function) != 0 && strcmp(l->function, "*") != 0) continue;
        int busy = is_busy(b, t);
        seconds = draw(l->least, busy ? l->busy : l->idle, busy ? l->busy_most : l->idle_most);
        *spins = l->spins;
        break;
    }
    const Fault *slow = fault_at(b, "slow", function, t); /* value in ns */
    return seconds + (slow ? 1e-9 * (double)slow->value : 0);
}

/* A handle is a number: board and MIG instance + 1. */
static Handle handle_of(int board, int mig) { return (Handle)(size_t)(0x10000 + board * 0x100 + mig + 1); }

static Ret begin(Call *call, const char *name, const char *cost, Handle handle, int of_board) {
    size_t number = (size_t)handle - 0x10000, index = number / 0x100;
    i64 now = fake_nvml_now_ns();
    pthread_mutex_lock(&lock);
    read_environment();
    count_call(name);
    if (sessions == 0) return call->wrong = UNINITIALIZED;
    if (!of_board) {
        call->t = now;
        return SUCCESS;
    }
    if ((size_t)handle < 0x10000 || index >= (size_t)machine.count) return call->wrong = INVALID_ARGUMENT;
    double seconds = latency_s(&machine.boards[index], cost, now, &call->spins);
    double first = seconds * (double)machine.read_at_permille / 1000;
    call->rest_s = seconds - first;
    pthread_mutex_unlock(&lock);
    pause_for(first, call->spins);
    call->t = fake_nvml_now_ns();
    pthread_mutex_lock(&lock);
    if (index >= (size_t)machine.count) return call->wrong = INVALID_ARGUMENT;
    call->board = &machine.boards[index];
    call->mig = (int)(number % 0x100) - 1;
    if (call->mig >= call->board->mig_count) return call->wrong = INVALID_ARGUMENT;
    const Fault *f = fault_at(call->board, "error", name, call->t);
    return call->wrong = f ? (Ret)f->value : SUCCESS;
}

static Ret end(Call *call, Ret code) {
    pthread_mutex_unlock(&lock);
    pause_for(call->rest_s, call->spins);
    return call->wrong ? call->wrong : code;
}

#define LEAVE(code) return end(&call, code)
#define SYSTEM Call call = {.mig = -1}; if (begin(&call, __func__, __func__, NULL, 0)) LEAVE(call.wrong);
#define DEVICE_COSTING(cost) Call call = {.mig = -1}; if (begin(&call, __func__, cost, handle, 1)) LEAVE(call.wrong); \
    Board *b = call.board; (void)b;
#define DEVICE DEVICE_COSTING(__func__)
#define WHOLE DEVICE if (call.mig >= 0) LEAVE(NOT_SUPPORTED); /* of a GPU, not of an instance of it */
#define ALIAS(name, of, ...) Ret name(__VA_ARGS__) __attribute__((alias(of)));

static const char COUNTER[] = "nvmlDeviceGetTotalEnergyConsumption";

static Ret text_out(char *to, unsigned size, const char *text) {
    if (!to) return INVALID_ARGUMENT;
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return SUCCESS;
}

/* ---------------------------------------------------------------- NVML: the library */

Ret nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&lock);
    read_environment();
    count_call("nvmlInit");
    Ret wrong = !configured ? DRIVER_NOT_LOADED : (Ret)machine.init_error;
    sessions += !wrong;
    pthread_mutex_unlock(&lock);
    return wrong;
}

Ret nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
Ret nvmlInit(void) { return nvmlInitWithFlags(0); }

Ret nvmlShutdown(void) {
    pthread_mutex_lock(&lock);
    count_call(__func__);
    Ret wrong = sessions > 0 ? SUCCESS : UNINITIALIZED;
    sessions -= !wrong;
    pthread_mutex_unlock(&lock);
    return wrong;
}

const char *nvmlErrorString(Ret code) {
    static const char *const TEXTS[] = {
        "Success", "Uninitialized", "Invalid Argument", "Not Supported", "Insufficient Permissions", "Already Initialized",
        "Not Found", "Insufficient Size", "Insufficient External Power", "Driver Not Loaded", "Timeout",
        "Interrupt Request Issue", "NVML Shared Library Not Found", "Function Not Found", "Corrupted infoROM", "GPU is lost",
        "GPU requires reset", "The operating system has blocked the request", "Driver/library version mismatch", "In use",
        "Insufficient Memory", "No data"};
    return code >= 0 && code < (int)(sizeof TEXTS / sizeof *TEXTS) ? TEXTS[code] : "Unknown Error";
}

Ret nvmlSystemGetDriverVersion(char *text, unsigned size) { SYSTEM LEAVE(text_out(text, size, machine.driver)); }
Ret nvmlSystemGetNVMLVersion(char *text, unsigned size) { SYSTEM LEAVE(text_out(text, size, machine.nvml)); }
Ret nvmlSystemGetCudaDriverVersion(int *version) { SYSTEM *version = (int)machine.cuda; LEAVE(SUCCESS); }
ALIAS(nvmlSystemGetCudaDriverVersion_v2, "nvmlSystemGetCudaDriverVersion", int *)
Ret nvmlSystemGetProcessName(unsigned pid, char *text, unsigned size) {
    SYSTEM char name[32];
    snprintf(name, sizeof name, "process-%u", pid);
    LEAVE(text_out(text, size, name));
}

/* ---------------------------------------------------------------- NVML: handles */

Ret nvmlDeviceGetCount_v2(unsigned *count) { SYSTEM *count = (unsigned)machine.count; LEAVE(SUCCESS); }
ALIAS(nvmlDeviceGetCount, "nvmlDeviceGetCount_v2", unsigned *)

static Ret found(Call *call, const char *name, Handle *to, int board, int mig) {
    const Fault *f = fault_at(&machine.boards[board], "error", name, call->t);
    *to = handle_of(board, mig);
    return f ? (Ret)f->value : SUCCESS;
}

Ret nvmlDeviceGetHandleByIndex_v2(unsigned index, Handle *handle) {
    SYSTEM if (index >= (unsigned)machine.count) LEAVE(INVALID_ARGUMENT);
    LEAVE(found(&call, __func__, handle, (int)index, -1));
}
ALIAS(nvmlDeviceGetHandleByIndex, "nvmlDeviceGetHandleByIndex_v2", unsigned, Handle *)

Ret nvmlDeviceGetHandleByUUID(const char *uuid, Handle *handle) {
    SYSTEM for (int i = 0; i < machine.count; i++) {
        Board *b = &machine.boards[i];
        if (strcmp(b->uuid, uuid) == 0) LEAVE(found(&call, __func__, handle, i, -1));
        for (int k = 0; k < b->mig_count; k++)
            if (strcmp(b->migs[k].uuid, uuid) == 0) LEAVE(found(&call, __func__, handle, i, k));
    }
    LEAVE(NOT_FOUND);
}

Ret nvmlDeviceGetHandleByPciBusId_v2(const char *bus, Handle *handle) {
    unsigned a[3] = {0}, c[3];
    SYSTEM if (sscanf(bus, "%x:%x:%x", &a[0], &a[1], &a[2]) != 3) LEAVE(INVALID_ARGUMENT);
    for (int i = 0; i < machine.count; i++)
        if (sscanf(machine.boards[i].pci, "%x:%x:%x", &c[0], &c[1], &c[2]) == 3 && memcmp(a, c, sizeof a) == 0)
            LEAVE(found(&call, __func__, handle, i, -1));
    LEAVE(NOT_FOUND);
}
ALIAS(nvmlDeviceGetHandleByPciBusId, "nvmlDeviceGetHandleByPciBusId_v2", const char *, Handle *)

/* ---------------------------------------------------------------- NVML: what a device is */

Ret nvmlDeviceGetName(Handle handle, char *text, unsigned size) {
    DEVICE if (call.mig < 0) LEAVE(text_out(text, size, b->name));
    char name[160];
    Mig *m = &b->migs[call.mig];
    snprintf(name, sizeof name, "%s MIG %lldg.%lldgb", b->name, m->slices, (i64)(m->memory >> 30));
    LEAVE(text_out(text, size, name));
}
Ret nvmlDeviceGetUUID(Handle handle, char *text, unsigned size) {
    DEVICE LEAVE(text_out(text, size, call.mig < 0 ? b->uuid : b->migs[call.mig].uuid));
}
Ret nvmlDeviceGetSerial(Handle handle, char *text, unsigned size) { WHOLE LEAVE(text_out(text, size, b->serial)); }
Ret nvmlDeviceGetPciInfo_v3(Handle handle, Pci *pci) {
    DEVICE memset(pci, 0, sizeof *pci);
    sscanf(b->pci, "%x:%x:%x", &pci->domain, &pci->bus, &pci->device);
    snprintf(pci->busId, sizeof pci->busId, "%s", b->pci);
    snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, "%04X:%02X:%02X.0", pci->domain & 0xffff, pci->bus & 0xff,
             pci->device & 0xff);
    pci->pciDeviceId = 0x233010de;
    LEAVE(SUCCESS);
}
ALIAS(nvmlDeviceGetPciInfo_v2, "nvmlDeviceGetPciInfo_v3", Handle, Pci *)
ALIAS(nvmlDeviceGetPciInfo, "nvmlDeviceGetPciInfo_v3", Handle, Pci *)

#define NUMBER(function, type, value) \
    Ret function(Handle handle, type *out) { WHOLE if (!out) LEAVE(INVALID_ARGUMENT); *out = (type)(value); LEAVE(SUCCESS); }
NUMBER(nvmlDeviceGetIndex, unsigned, b->index)
NUMBER(nvmlDeviceGetMinorNumber, unsigned, b->index)
NUMBER(nvmlDeviceGetBrand, unsigned, b->brand)
NUMBER(nvmlDeviceGetArchitecture, unsigned, b->arch)
NUMBER(nvmlDeviceGetBoardId, unsigned, 0x100 * (b->index + 1))
NUMBER(nvmlDeviceGetMultiGpuBoard, unsigned, 0)
NUMBER(nvmlDeviceGetComputeMode, unsigned, b->compute_mode)
NUMBER(nvmlDeviceGetVirtualizationMode, unsigned, b->virtualization)
NUMBER(nvmlDeviceGetPersistenceMode, unsigned, b->persistence)
NUMBER(nvmlDeviceGetPowerManagementMode, unsigned, 1)
NUMBER(nvmlDeviceGetPowerManagementLimit, unsigned, b->limit_mw)
NUMBER(nvmlDeviceGetPowerManagementDefaultLimit, unsigned, b->default_limit_mw)
NUMBER(nvmlDeviceGetEnforcedPowerLimit, unsigned, b->enforced_limit_mw)
NUMBER(nvmlDeviceGetCurrPcieLinkGeneration, unsigned, b->pcie_gen)
NUMBER(nvmlDeviceGetCurrPcieLinkWidth, unsigned, b->pcie_width)
NUMBER(nvmlDeviceGetMaxPcieLinkGeneration, unsigned, b->pcie_gen)
NUMBER(nvmlDeviceGetMaxPcieLinkWidth, unsigned, b->pcie_width)
NUMBER(nvmlDeviceGetPerformanceState, unsigned, b->pstate)
NUMBER(nvmlDeviceGetPowerState, unsigned, b->pstate)
NUMBER(nvmlDeviceGetMaxMigDeviceCount, unsigned, b->max_migs)
NUMBER(nvmlDeviceGetNumaNodeId, int, 0)
NUMBER(nvmlDeviceGetCurrentClocksEventReasons, u64, b->reasons)
NUMBER(nvmlDeviceGetCurrentClocksThrottleReasons, u64, b->reasons)
NUMBER(nvmlDeviceGetSupportedClocksEventReasons, u64, 0x1ff)
ALIAS(nvmlDeviceGetSupportedClocksThrottleReasons, "nvmlDeviceGetSupportedClocksEventReasons", Handle, u64 *)

Ret nvmlDeviceGetCudaComputeCapability(Handle handle, int *major, int *minor) {
    DEVICE *major = (int)b->cc_major;
    *minor = (int)b->cc_minor;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetPowerManagementLimitConstraints(Handle handle, unsigned *least, unsigned *most) {
    WHOLE *least = (unsigned)b->min_limit_mw;
    *most = (unsigned)b->max_limit_mw;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetC2cModeInfoV(Handle handle, C2c *info) {
    WHOLE if (!b->c2c) LEAVE(NOT_SUPPORTED);
    info->isC2cEnabled = 1;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetTopologyCommonAncestor(Handle handle, Handle other, unsigned *level) {
    WHOLE *level = handle == other ? 0 : (unsigned)machine.topology;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetP2PStatus(Handle handle, Handle other, unsigned what, unsigned *status) {
    (void)other;
    (void)what;
    WHOLE *status = b->nvlinks > 0 ? 0 : 3; /* 3: not supported */
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetNvLinkState(Handle handle, unsigned link, unsigned *active) {
    WHOLE if (b->nvlinks == 0) LEAVE(NOT_SUPPORTED);
    if (link >= (unsigned)b->nvlinks) LEAVE(INVALID_ARGUMENT);
    *active = 1;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetNvLinkVersion(Handle handle, unsigned link, unsigned *version) {
    WHOLE if (link >= (unsigned)b->nvlinks) LEAVE(b->nvlinks ? INVALID_ARGUMENT : NOT_SUPPORTED);
    *version = 4;
    LEAVE(SUCCESS);
}

/* ---------------------------------------------------------------- NVML: MIG */

Ret nvmlDeviceGetMigMode(Handle handle, unsigned *current, unsigned *pending) {
    WHOLE if (b->max_migs == 0) LEAVE(NOT_SUPPORTED);
    *current = *pending = (unsigned)b->mig_mode;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetMigDeviceHandleByIndex(Handle handle, unsigned index, Handle *instance) {
    WHOLE if (!b->mig_mode) LEAVE(NOT_SUPPORTED);
    if (index >= (unsigned)b->max_migs) LEAVE(INVALID_ARGUMENT);
    if (index >= (unsigned)b->mig_count) LEAVE(NOT_FOUND);
    *instance = handle_of(b->index, (int)index);
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Handle handle, Handle *parent) {
    DEVICE if (call.mig < 0) LEAVE(INVALID_ARGUMENT);
    *parent = handle_of(b->index, -1);
    LEAVE(SUCCESS);
}
Ret nvmlDeviceIsMigDeviceHandle(Handle handle, unsigned *answer) {
    DEVICE *answer = call.mig >= 0;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetGpuInstanceId(Handle handle, unsigned *id) {
    DEVICE if (call.mig < 0) LEAVE(NOT_SUPPORTED);
    *id = (unsigned)b->migs[call.mig].gi;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetComputeInstanceId(Handle handle, unsigned *id) {
    DEVICE if (call.mig < 0) LEAVE(NOT_SUPPORTED);
    *id = (unsigned)b->migs[call.mig].ci;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetAttributes_v2(Handle handle, Attributes *attributes) {
    DEVICE if (call.mig < 0) LEAVE(NOT_SUPPORTED);
    *attributes = (Attributes){.multiprocessorCount = (unsigned)(16 * b->migs[call.mig].slices),
                               .gpuInstanceSliceCount = (unsigned)b->migs[call.mig].slices,
                               .computeInstanceSliceCount = (unsigned)b->migs[call.mig].slices,
                               .memorySizeMB = b->migs[call.mig].memory >> 20};
    LEAVE(SUCCESS);
}
ALIAS(nvmlDeviceGetAttributes, "nvmlDeviceGetAttributes_v2", Handle, Attributes *)

/* ---------------------------------------------------------------- NVML: energy and power */

Ret nvmlDeviceGetTotalEnergyConsumption(Handle handle, u64 *mj) {
    WHOLE if (!b->has_counter) LEAVE(NOT_SUPPORTED);
    *mj = counter_mj(b, call.t);
    LEAVE(SUCCESS);
}

Ret nvmlDeviceGetPowerUsage(Handle handle, unsigned *mw) {
    WHOLE if (b->usage == 0) LEAVE(NOT_SUPPORTED);
    *mw = b->usage == 185 ? average_mw(b, call.t, 1) : instant_mw(b, call.t);
    LEAVE(SUCCESS);
}

static Ret answer_field(const Board *b, i64 t, Field *f) {
    char name[24];
    snprintf(name, sizeof name, "field:%u", f->fieldId);
    const Fault *fault = fault_at(b, "error", name, t);
    if (fault) return (Ret)fault->value;
    f->valueType = 1; /* unsigned int */
    int module = f->scopeId == 1 && b->module_scope, whole = f->scopeId == 0 || module;
    switch (f->fieldId) {
    case 82: return f->value.uiVal = (unsigned)b->memory_temperature_c, SUCCESS;
    case 83: case 191:
        if (!b->has_counter || !whole) return NOT_SUPPORTED;
        f->valueType = 3; /* unsigned long long */
        return f->value.ullVal = counter_mj(b, t), SUCCESS;
    case 185:
        if (b->average_window_ns == 0 || !(whole || (f->scopeId == 2 && b->memory_share > 0))) return NOT_SUPPORTED;
        return f->value.uiVal = average_mw(b, t, f->scopeId == 2 ? b->memory_share : 1), SUCCESS;
    case 186:
        if (b->instant_window_ns == 0 || !whole) return NOT_SUPPORTED;
        return f->value.uiVal = instant_mw(b, t), SUCCESS;
    case 187: return f->value.uiVal = (unsigned)b->min_limit_mw, SUCCESS;
    case 188: return f->value.uiVal = (unsigned)b->max_limit_mw, SUCCESS;
    case 189: return f->value.uiVal = (unsigned)b->default_limit_mw, SUCCESS;
    case 190: return f->value.uiVal = (unsigned)b->enforced_limit_mw, SUCCESS;
    case 192: return f->value.uiVal = (unsigned)b->limit_mw, SUCCESS;
    default: return NOT_SUPPORTED;
    }
}

Ret nvmlDeviceGetFieldValues(Handle handle, int count, Field *fields) {
    const char *cost = __func__; /* the counter costs as much by this way as by its own */
    for (int i = 0; i < count; i++)
        if (fields[i].fieldId == 83 || fields[i].fieldId == 191) cost = COUNTER;
    DEVICE_COSTING(cost) if (call.mig >= 0) LEAVE(NOT_SUPPORTED);
    for (int i = 0; i < count; i++) {
        fields[i].timestamp = (call.t + fake_nvml_wall_offset_ns()) / 1000;
        fields[i].latencyUsec = 0;
        fields[i].value.ullVal = 0;
        fields[i].nvmlReturn = (unsigned)answer_field(b, call.t, &fields[i]);
    }
    LEAVE(SUCCESS);
}

Ret nvmlDeviceGetSamples(Handle handle, unsigned kind, u64 last_seen, unsigned *type, unsigned *count, Sample *samples) {
    WHOLE if (kind != 0 || b->sample_count == 0) LEAVE(NOT_SUPPORTED);
    *type = 1;
    if (!samples) {
        *count = (unsigned)b->sample_count;
        LEAVE(SUCCESS);
    }
    unsigned room = *count, used = 0;
    i64 newest = floor_div(call.t - b->sample_delay_ns - b->sample_phase_ns, b->sample_ns);
    for (i64 k = newest - b->sample_count + 1; k <= newest && used < room; k++) {
        i64 at = k * b->sample_ns + b->sample_phase_ns;
        u64 stamp = (u64)((at + fake_nvml_wall_offset_ns()) / 1000);
        if (stamp <= last_seen) continue;
        samples[used].timeStamp = stamp;
        samples[used].sampleValue.ullVal = 0;
        samples[used++].sampleValue.uiVal = power_mw(b, at, b->sample_window_ns, 0, 0, 1);
    }
    *count = used;
    LEAVE(used ? SUCCESS : NOT_FOUND);
}

/* ---------------------------------------------------------------- NVML: the rest of what monitors ask */

Ret nvmlDeviceGetTemperature(Handle handle, unsigned sensor, unsigned *celsius) {
    WHOLE if (sensor != 0) LEAVE(INVALID_ARGUMENT);
    *celsius = (unsigned)b->temperature_c;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetTemperatureV(Handle handle, Temperature *t) {
    WHOLE if (t->version != 0x100000c) LEAVE(VERSION_MISMATCH);
    t->temperature = (int)b->temperature_c;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetTemperatureThreshold(Handle handle, unsigned which, unsigned *celsius) {
    (void)which;
    WHOLE *celsius = 87;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetUtilizationRates(Handle handle, Utilization *rates) {
    WHOLE int busy = is_busy(b, call.t);
    rates->gpu = b->utilization >= 0 ? (unsigned)b->utilization : busy ? 100 : 0;
    rates->memory = b->memory_utilization >= 0 ? (unsigned)b->memory_utilization : busy ? 50 : 0;
    LEAVE(SUCCESS);
}

static Ret clock_of(const i64 mhz[4], unsigned kind, unsigned *out) { /* graphics, SM, memory, video */
    if (kind > 3) return INVALID_ARGUMENT;
    *out = (unsigned)mhz[kind];
    return SUCCESS;
}
Ret nvmlDeviceGetClockInfo(Handle handle, unsigned kind, unsigned *mhz) {
    WHOLE LEAVE(clock_of((i64[]){b->graphics_mhz, b->sm_mhz, b->memory_mhz, b->video_mhz}, kind, mhz));
}
Ret nvmlDeviceGetMaxClockInfo(Handle handle, unsigned kind, unsigned *mhz) {
    WHOLE LEAVE(clock_of((i64[]){b->max_sm_mhz, b->max_sm_mhz, b->max_memory_mhz, b->max_sm_mhz}, kind, mhz));
}
Ret nvmlDeviceGetClock(Handle handle, unsigned kind, unsigned id, unsigned *mhz) {
    (void)id;
    WHOLE LEAVE(clock_of((i64[]){b->graphics_mhz, b->sm_mhz, b->memory_mhz, b->video_mhz}, kind, mhz));
}

static Ret numbers_out(const unsigned *from, unsigned n, unsigned *count, unsigned *out) {
    unsigned room = *count;
    *count = n;
    if (room < n || !out) return INSUFFICIENT_SIZE;
    memcpy(out, from, n * sizeof *from);
    return SUCCESS;
}
Ret nvmlDeviceGetSupportedMemoryClocks(Handle handle, unsigned *count, unsigned *mhz) {
    WHOLE LEAVE(numbers_out((unsigned[]){(unsigned)b->max_memory_mhz}, 1, count, mhz));
}
Ret nvmlDeviceGetSupportedGraphicsClocks(Handle handle, unsigned memory, unsigned *count, unsigned *mhz) {
    (void)memory;
    WHOLE unsigned all[] = {(unsigned)b->max_sm_mhz, (unsigned)b->max_sm_mhz / 2, 210};
    LEAVE(numbers_out(all, 3, count, mhz));
}

Ret nvmlDeviceGetMemoryInfo(Handle handle, Memory *m) {
    DEVICE m->total = call.mig < 0 ? (u64)b->memory_total : b->migs[call.mig].memory;
    m->used = call.mig < 0 ? (u64)(b->memory_used + b->memory_reserved) : 0;
    m->free = m->total - m->used;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetMemoryInfo_v2(Handle handle, Memory2 *m) {
    DEVICE_COSTING("nvmlDeviceGetMemoryInfo") if (m->version != 0x02000028) LEAVE(VERSION_MISMATCH);
    m->total = call.mig < 0 ? (u64)b->memory_total : b->migs[call.mig].memory;
    m->used = call.mig < 0 ? (u64)b->memory_used : 0;
    m->reserved = call.mig < 0 ? (u64)b->memory_reserved : 0;
    m->free = m->total - m->used - m->reserved;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetFanSpeed(Handle handle, unsigned *percent) {
    WHOLE if (b->fan < 0) LEAVE(NOT_SUPPORTED);
    *percent = (unsigned)b->fan;
    LEAVE(SUCCESS);
}
Ret nvmlDeviceGetEccMode(Handle handle, unsigned *current, unsigned *pending) {
    WHOLE *current = *pending = 1;
    LEAVE(SUCCESS);
}

static Ret processes_of(const Board *b, char kind, unsigned *count, Process *out) {
    unsigned n = 0, room = *count;
    for (int i = 0; i < b->process_count; i++) n += b->processes[i].kind == kind;
    *count = n;
    if (n == 0) return SUCCESS;
    if (room < n || !out) return INSUFFICIENT_SIZE;
    for (int i = 0; i < b->process_count; i++)
        if (b->processes[i].kind == kind)
            *out++ = (Process){(unsigned)b->processes[i].pid, b->processes[i].memory, 0xffffffff, 0xffffffff};
    return SUCCESS;
}
Ret nvmlDeviceGetComputeRunningProcesses_v3(Handle handle, unsigned *count, Process *out) {
    DEVICE LEAVE(processes_of(b, 'C', count, out));
}
ALIAS(nvmlDeviceGetComputeRunningProcesses_v2, "nvmlDeviceGetComputeRunningProcesses_v3", Handle, unsigned *, Process *)
Ret nvmlDeviceGetGraphicsRunningProcesses_v3(Handle handle, unsigned *count, Process *out) {
    DEVICE LEAVE(processes_of(b, 'G', count, out));
}
ALIAS(nvmlDeviceGetGraphicsRunningProcesses_v2, "nvmlDeviceGetGraphicsRunningProcesses_v3", Handle, unsigned *, Process *)

/* An ordinary user may set nothing. */
#define SETTER(function, ...) Ret function(__VA_ARGS__) { WHOLE LEAVE(NO_PERMISSION); }
SETTER(nvmlDeviceSetPersistenceMode, Handle handle, unsigned mode __attribute__((unused)))
SETTER(nvmlDeviceSetPowerManagementLimit, Handle handle, unsigned mw __attribute__((unused)))
SETTER(nvmlDeviceSetGpuLockedClocks, Handle handle, unsigned a __attribute__((unused)), unsigned c __attribute__((unused)))
SETTER(nvmlDeviceResetGpuLockedClocks, Handle handle)
SETTER(nvmlDeviceSetMemoryLockedClocks, Handle handle, unsigned a __attribute__((unused)), unsigned c __attribute__((unused)))
SETTER(nvmlDeviceResetMemoryLockedClocks, Handle handle)
