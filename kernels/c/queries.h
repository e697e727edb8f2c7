// The queries of attention, and what is kept for each.
//
// One task: the queries of some tokens against a context that is read from its pages 64 tokens at a time. For each
// query there are a score near the greatest so far, the sum of weights relative to it, and the weighted sum of values
// (online softmax, Milakov and Gimelshein 2018). Tokens of several calls whose contexts begin alike are one task: they
// go through that beginning together, then each through its own rest.
//
// 16 queries are a unit, and what belongs to one of them is in a lane of its own: softmax needs no maximum and no sum
// across lanes. A unit may hold queries of several key/value heads: for each of these there is a factor in which the
// other heads' queries are zero, and the scores are the sum.
//
//   scores [tokens, lanes] = keys [tokens, D] x queries [D, lanes], for each head
//   sums   [lanes, D]     += weights [lanes, tokens] x values [tokens, D], for each head

enum { SPAN = 64, LANES = 16, MOST_TOGETHER = 8 };

typedef struct {
    const i64 *page_table;
    i64 pages_per_slot, page_size, heads, kv_heads, size, window;
    const int32_t *runs, *tasks;
    i64 num_tasks;
} Contexts;

typedef struct {
    const bf16 *q, *keys, *values;
    bf16 *out;
    const Contexts *contexts;
    i64 together;  // key/value heads of a task
    int form;
} Attention;

// A run of tokens of one call: its first token in the step, how many, its slot, and the position of the first.
enum { RUN_TOKEN, RUN_COUNT, RUN_SLOT, RUN_POSITION, RUN_FIELDS };
// A task: its first run, how many, and the tokens that their contexts share.
enum { TASK_RUN, TASK_COUNT, TASK_SHARED, TASK_FIELDS };

// A row is a query: those of the first head in the order of tokens, then those of the next. Behind the last, or behind
// those of each head, there may be lanes without one.
typedef struct {
    const Attention *job;
    i64 head;            // the first
    i64 each, units;     // lanes of a head, and units of all
    i64 most;            // heads in a unit, at most
    int32_t *tokens;     // [lanes] in the step
    int32_t *numbers;    // the same: where they stand among those of all heads of the token
    int32_t *positions;  // the same
    int32_t *runs;       // the same: which of the task's; -1 for lanes without a row
    float *best;         // the same
    float *weights;      // the same
    bf16 *q;             // [units, most, D / 32] tiles: of each two numbers of a head, 16 queries in pairs
    float *sums;         // [units, most, D / 16] tiles: 16 lanes
    bf16 *keys;          // [SPAN, K, D], of tokens that do not fill a tile in a page
    bf16 *values;        // [heads, SPAN / 32, D / 16] tiles: of each two tokens, 16 numbers in pairs
    float *scores;       // two units of [SPAN, LANES]
    bf16 *shares;        // [SPAN / 32] tiles: 16 lanes
} Queries;

// A unit's heads.
static i64 first_head(const Queries *queries, i64 unit) { return unit * LANES / queries->each; }

static i64 last_head(const Queries *queries, i64 unit) {
    return MIN(((unit + 1) * LANES - 1) / queries->each, queries->job->together - 1);
}

// `rows` are those of a head. Each head begins a unit where that takes no more of them.
static size_t lay_out(Queries *queries, char *memory, i64 rows) {
    size_t at = 0;
    const i64 heads = queries->job->together, size = queries->job->contexts->size;
    const i64 apart = (rows + LANES - 1) / LANES, units = (rows * heads + LANES - 1) / LANES, lanes = units * LANES;
    queries->units = units;
    queries->each = apart * heads == units ? apart * LANES : rows;
    queries->most = 1;
    for (i64 unit = 0; unit < units; unit++)
        queries->most = MAX(queries->most, last_head(queries, unit) - first_head(queries, unit) + 1);
    const i64 numbers = lanes * queries->most * size;
#define PLACE(field, bytes) queries->field = (void *)(memory + at), at += ((size_t)(bytes) + 63) / 64 * 64
    PLACE(tokens, lanes * 4);
    PLACE(numbers, lanes * 4);
    PLACE(positions, lanes * 4);
    PLACE(runs, lanes * 4);
    PLACE(best, lanes * 4);
    PLACE(weights, lanes * 4);
    PLACE(q, numbers * 2);
    PLACE(sums, numbers * 4);
    PLACE(keys, SPAN * queries->job->contexts->kv_heads * size * 2);
    PLACE(values, heads * SPAN * size * 2);
    PLACE(scores, 2 * SPAN * LANES * 4);
    PLACE(shares, SPAN * LANES * 2);
#undef PLACE
    return at;
}

// Where what is kept of a unit for a head begins.
static i64 place_in(const Queries *queries, i64 unit, i64 head) {
    return (unit * queries->most + head - first_head(queries, unit)) * queries->job->contexts->size * LANES;
}

static bf16 *q_of(const Queries *queries, i64 unit, i64 head) { return queries->q + place_in(queries, unit, head); }

static float *sums_of(const Queries *queries, i64 unit, i64 head) {
    return queries->sums + place_in(queries, unit, head);
}

// 16 rows of 16 doublewords, rows becoming columns.
static void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

static i64 group_of(const Contexts *contexts) { return contexts->heads / contexts->kv_heads; }

// Rows of a head.
static i64 rows_of(const Contexts *contexts, const int32_t *task) {
    i64 tokens = 0;
    for (int i = 0; i < task[TASK_COUNT]; i++) tokens += contexts->runs[(task[TASK_RUN] + i) * RUN_FIELDS + RUN_COUNT];
    return tokens * group_of(contexts);
}

static void name_rows(const Queries *queries, const int32_t *runs, i64 count) {
    const Contexts *contexts = queries->job->contexts;
    const i64 group = group_of(contexts), lanes = queries->units * LANES;
    for (i64 row = 0; row < lanes; row++) {
        queries->tokens[row] = queries->numbers[row] = 0;
        queries->positions[row] = INT32_MAX;
        queries->runs[row] = -1;
        queries->best[row] = -1e30f;
        queries->weights[row] = 0;
    }
    for (i64 head = 0; head < queries->job->together; head++) {
        i64 row = head * queries->each;
        for (i64 i = 0; i < count; i++) {
            const int32_t *run = runs + i * RUN_FIELDS;
            for (int32_t token = 0; token < run[RUN_COUNT]; token++)
                for (i64 j = 0; j < group; j++, row++) {
                    queries->tokens[row] = run[RUN_TOKEN] + token;
                    queries->numbers[row] = (int32_t)(((queries->head + head) * group + j) * contexts->size);
                    queries->positions[row] = run[RUN_POSITION] + token;
                    queries->runs[row] = (int32_t)i;
                }
        }
    }
}

static void copy_queries(const Queries *queries) {
    const Attention *job = queries->job;
    const i64 size = job->contexts->size, width = job->contexts->heads * size;
    for (i64 unit = 0; unit < queries->units; unit++)
        for (i64 head = first_head(queries, unit); head <= last_head(queries, unit); head++) {
            const i64 begin = head * queries->each, end = begin + queries->each;
            for (i64 part = 0; part < size / 32; part++) {
                __m512i lanes[LANES];
                for (i64 lane = 0, row = unit * LANES; lane < LANES; lane++, row++) {
                    const int is_there = row >= begin && row < end && queries->runs[row] >= 0;
                    const bf16 *from = job->q + queries->tokens[row] * width + queries->numbers[row] + 32 * part;
                    lanes[lane] = is_there ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
                }
                transpose(lanes);
                bf16 *out = q_of(queries, unit, head) + part * 512;
                for (i64 i = 0; i < LANES; i++) _mm512_store_si512(out + 32 * i, lanes[i]);
            }
        }
}

static void copy_results(const Queries *queries) {
    const Attention *job = queries->job;
    const i64 size = job->contexts->size, width = job->contexts->heads * size;
    // Fours of a value's numbers go to one tile and the other in turn.
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (i64 head = 0; head < job->together; head++)
        for (i64 row = head * queries->each; row < (head + 1) * queries->each; row++) {
            if (queries->runs[row] < 0) continue;
            const __m512 factor = _mm512_set1_ps(1.0f / queries->weights[row]);
            const float *sums = sums_of(queries, row / LANES, head) + row % LANES * 16;
            const i64 token = queries->tokens[row];
            for (i64 d = 0, at = queries->numbers[row]; d < size; d += 32, at += 32) {
                const __m512 low = _mm512_load_ps(sums + d * LANES), high = _mm512_load_ps(sums + (d + 16) * LANES);
                bf16 *out = job->out + (job->form == ROWS ? token * width + at : tile_place(token, at, width));
                store_bf16(out, _mm512_mul_ps(_mm512_permutex2var_ps(low, first, high), factor));
                store_bf16(out + 16, _mm512_mul_ps(_mm512_permutex2var_ps(low, second, high), factor));
            }
        }
}
