// Threads: those of torch, whose pool spins between operations.

// What threads take work from: of their own first, then from those that have some left.
typedef struct {
    i64 next, end;
} ALIGNED Share;

typedef struct {
    void (*work)(void *job, i64 index, char *memory);
    void *job;
    Share *shares;
    i64 num_shares, chunk;
    size_t bytes;
} Loop;

static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*max_threads)(void), (*thread_number)(void);

// Tiles may be configured already by another library, which remembers it: it gets its configuration back.
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} ALIGNED Tiles;

static void configure(const Tiles *tiles) {
    if (tiles->palette)
        __asm__ volatile("ldtilecfg %0" : : "m"(*tiles));
    else
        __asm__ volatile("tilerelease" : : :);
}

// Memory that a thread keeps from one operation to the next.
static __thread char *scratch;
static __thread size_t scratch_size;

static int reserve(size_t size) {
    if (size <= scratch_size) return 1;
    free(scratch);
    scratch = NULL;
    scratch_size = 0;
    if (posix_memalign((void **)&scratch, 64, size)) return 0;
    scratch_size = size;
    return 1;
}

static void take_part(void *shared) {
    Loop *loop = shared;
    Tiles before;
    if (!reserve(loop->bytes)) return;
    __asm__ volatile("sttilecfg %0" : "=m"(before));
    const i64 own = thread_number();
    for (i64 i = 0; i < loop->num_shares; i++) {
        Share *share = loop->shares + (own + i) % loop->num_shares;
        for (;;) {
            const i64 begin = __atomic_fetch_add(&share->next, loop->chunk, __ATOMIC_RELAXED);
            const i64 end = MIN(begin + loop->chunk, share->end);
            if (begin >= end) break;
            for (i64 index = begin; index < end; index++) loop->work(loop->job, index, scratch);
        }
    }
    configure(&before);
    _mm_sfence();  // streamed results are there for all threads
}

// Whether a thread begins with the same part of all work each time, and so finds in its caches what it has written in
// the operation before; or with whatever is next, because parts take unlike times.
typedef enum { ANY, OWN } Whose;

// Calls work(job, 0 .. count - 1, memory), each once, with `bytes` of memory for each thread. 0 if there was not
// enough. A thread takes some that follow each other at a time, and reads memory in its order; a slow one takes fewer.
static int run(void (*work)(void *, i64, char *), void *job, i64 count, i64 parts, size_t bytes, Whose first) {
    if (!count) return 1;
    const i64 threads = MIN(count, max_threads()), num_shares = first == OWN ? threads : 1;
    Share shares[num_shares];
    for (i64 i = 0; i < num_shares; i++) shares[i] = (Share){count * i / num_shares, count * (i + 1) / num_shares};
    Loop loop = {work, job, shares, num_shares, MAX(1, count / (parts * threads)), bytes};
    gomp_parallel(take_part, &loop, count > 1 ? 0 : 1, 0);
    for (i64 i = 0; i < num_shares; i++)
        if (shares[i].next < shares[i].end) return 0;
    return 1;
}

// Asks the system for the use of tiles. 0 if it refuses.
int treadle_begin(void *parallel, void *threads, void *number) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    gomp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    max_threads = (int (*)(void))threads;
    thread_number = (int (*)(void))number;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
