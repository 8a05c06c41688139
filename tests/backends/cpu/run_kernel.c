/* Runs one compiled kernel without TVM's runtime, as an emulator of another CPU can.

   cc -DKERNEL=__tvm_ffi_NAME run_kernel.c kernel.o -o run -lm && ./run arguments result

   `arguments` holds an int32 count, then of each array int32 type code, bits and number of dims, its int64 dims, its
   data. The last array is the output, whose data goes to `result`. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct { int32_t type, id; } Device;
typedef struct { uint8_t code, bits; uint16_t lanes; } Type;
typedef struct { void *data; Device device; int32_t ndim; Type type; int64_t *shape, *strides; uint64_t offset; } Array;
typedef struct { int32_t kind; uint32_t zero; void *pointer; } Argument;
typedef struct { void *sync; int32_t tasks; } Pool;

enum { ARRAY_POINTER = 7, TASKS = 3, ALIGNMENT = 64 };

extern int KERNEL(void *self, const Argument *arguments, int32_t count, Argument *result);

/* The runtime sets these pointers when it loads a library; a kernel that needs none of them does not have it. */
extern void *__TVMBackendAllocWorkspace __attribute__((weak));
extern void *__TVMBackendFreeWorkspace __attribute__((weak));
extern void *__TVMBackendParallelLaunch __attribute__((weak));

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *text) { fprintf(stderr, "%s: %s\n", kind, text); }

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; i++) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

static void *aligned(uint64_t size) { return aligned_alloc(ALIGNMENT, (size / ALIGNMENT + 1) * ALIGNMENT); }

static void *allocate(int type, int id, uint64_t size, int code, int bits) {
  (void)type, (void)id, (void)code, (void)bits;
  return aligned(size);
}

static int release(int type, int id, void *room) {
  (void)type, (void)id;
  free(room);
  return 0;
}

/* One task after another; more than one, so that their shares are tested. */
static int launch(int (*task)(int, Pool *, void *), void *closure, int count) {
  Pool pool = {0, count > 0 ? count : TASKS};
  for (int i = 0; i < pool.tasks; i++)
    if (task(i, &pool, closure)) return 1;
  return 0;
}

static void read_exactly(void *room, size_t size, size_t count, FILE *file) {
  if (fread(room, size, count, file) != count) {
    fputs("the file of arguments is too short\n", stderr);
    exit(3);
  }
}

int main(int argc, char **argv) {
  FILE *in = argc == 3 ? fopen(argv[1], "rb") : NULL, *out;
  if (!in) return fputs("usage: run arguments result\n", stderr), 2;
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = (void *)allocate;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = (void *)release;
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = (void *)launch;
  int32_t count;
  read_exactly(&count, sizeof count, 1, in);
  Array *arrays = calloc(count, sizeof *arrays);
  Argument *arguments = calloc(count, sizeof *arguments), result = {0};
  size_t size = 0;
  for (int i = 0; i < count; i++) {
    int32_t head[3];
    read_exactly(head, sizeof *head, 3, in);
    int64_t *shape = calloc(head[2] + 1, sizeof *shape);
    read_exactly(shape, sizeof *shape, head[2], in);
    size = head[1] / 8;
    for (int d = 0; d < head[2]; d++) size *= shape[d];
    arrays[i] = (Array){aligned(size), {1, 0}, head[2], {head[0], head[1], 1}, shape, 0, 0};
    read_exactly(arrays[i].data, 1, size, in);
    arguments[i] = (Argument){ARRAY_POINTER, 0, &arrays[i]};
  }
  if (KERNEL(0, arguments, count, &result)) return 1;
  out = fopen(argv[2], "wb");
  return !out || fwrite(arrays[count - 1].data, 1, size, out) != size || fclose(out);
}
