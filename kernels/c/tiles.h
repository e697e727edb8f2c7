// Tiles of AMX, and vectors of bfloat16. The "memory" that these clobber keeps compilers from moving stores to a tile's
// memory behind its load.

#define LOAD(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((i64)(stride)) : "memory")
// From the second level of caches, without taking room in the first: for what is not read again soon.
#define LOAD_ONCE(tile, from, stride) \
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((i64)(stride)) : "memory")
#define STORE(tile, to, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((i64)(stride)) : "memory")
#define CLEAR(tile) __asm__ volatile("tilezero %%tmm" #tile : : :)
#define MULTIPLY_ADD(sum, left, right) \
    __asm__ volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum : : :)

// Sums in tiles 0 and 1 with left tile 4 have `first` rows, sums 2 and 3 with left tile 5 `second`; tiles 6 and 7 are
// right factors.
static void configure_rows(int first, int second) {
    Tiles tiles = {.palette = 1};
    const int rows[8] = {first, first, second, second, first, second, 16, 16};
    for (int tile = 0; tile < 8; tile++) {
        tiles.rows[tile] = (uint8_t)MAX(rows[tile], 1);
        tiles.row_bytes[tile] = 64;
    }
    configure(&tiles);
}

// The sums in tiles 0 to 3 as 32 by 32 numbers, tiles 2 and 3 being the 16 rows `below`.
static inline void clear_sums(void) {
    CLEAR(0);
    CLEAR(1);
    CLEAR(2);
    CLEAR(3);
}

static inline void load_sums(const float *sums, int below) {
    LOAD(0, sums, 128);
    LOAD(1, sums + 16, 128);
    if (!below) return;
    LOAD(2, sums + 16 * 32, 128);
    LOAD(3, sums + 16 * 32 + 16, 128);
}

static inline void store_sums(float *sums, int below) {
    STORE(0, sums, 128);
    STORE(1, sums + 16, 128);
    if (!below) return;
    STORE(2, sums + 16 * 32, 128);
    STORE(3, sums + 16 * 32 + 16, 128);
}

static inline __m512 widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

static inline __m512 load_bf16(const bf16 *from) { return widen(_mm256_loadu_si256((const __m256i *)from)); }

static inline void store_bf16(bf16 *to, __m512 x) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

// e to the power of x, to 1e-7 of it; 0 far below, and not a number for what is none.
static inline __m512 exponential(__m512 x) {
    const __m512 y = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-126 * 0.6931472f), x), _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(y, whole);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    const __mmask16 far_below = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126 * 0.6931472f), _CMP_LT_OQ);
    return _mm512_mask_blend_ps(far_below, _mm512_scalef_ps(p, whole), _mm512_setzero_ps());
}
