// What lowered kernels need on this CPU: MLIR's copy of a memref, and a call of every program of a grid that survives a
// wild access and says where it was.
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  int64_t rank;
  int64_t *descriptor;  // allocated, aligned, offset, sizes[rank], strides[rank]
} Memref;

void memrefCopy(int64_t element, Memref *from, Memref *to) {  // of rank 0, 1 or 2
  int64_t rank = from->rank, *a = from->descriptor, *b = to->descriptor;
  char *source = (char *)a[1] + a[2] * element, *target = (char *)b[1] + b[2] * element;
  int64_t rows = rank > 0 ? a[3] : 1, columns = rank > 1 ? a[4] : 1;
  int64_t source_row = rank > 0 ? a[3 + rank] : 0, target_row = rank > 0 ? b[3 + rank] : 0;
  int64_t source_column = rank > 1 ? a[4 + rank] : 0, target_column = rank > 1 ? b[4 + rank] : 0;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++)
      memcpy(target + (i * target_row + j * target_column) * element,
             source + (i * source_row + j * source_column) * element, element);
}

static sigjmp_buf escape;
static void *wild;

static void on_fault(int signal, siginfo_t *info, void *context) {
  wild = info->si_addr;
  siglongjmp(escape, 1);
}

#define FOUR(i) a[i], a[i + 1], a[i + 2], a[i + 3]
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)

// Calls kernel(arguments..., grid x, y, z, program x, y, z) for every program. `a` holds 128 words, of which the kernel
// takes those it has: on x86-64 an integer of any width is a word, and words too many are nobody's. Returns 1 after a
// wild access, and its address.
int run_grid(void (*kernel)(), int64_t *a, int count, const int32_t *grid, void **where) {
  struct sigaction action = {0}, segv, bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &segv);
  sigaction(SIGBUS, &action, &bus);
  int failed = sigsetjmp(escape, 1);
  if (!failed) {
    for (int i = 0; i < 3; i++) a[count + i] = grid[i];
    for (int z = 0; z < grid[2]; z++)
      for (int y = 0; y < grid[1]; y++)
        for (int x = 0; x < grid[0]; x++) {
          a[count + 3] = x, a[count + 4] = y, a[count + 5] = z;
          kernel(SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64), SIXTEEN(80), SIXTEEN(96), SIXTEEN(112));
        }
  }
  sigaction(SIGSEGV, &segv, 0);
  sigaction(SIGBUS, &bus, 0);
  *where = wild;
  return failed;
}
