// Contexts in pages: where the keys and values of a span lie, and how they come into tiles.

// Where the first head's keys and values of each token of a span begin; those behind the last are at -1.
typedef struct {
    i64 at[SPAN];
} Places;

// Tokens `from` to `to` of a slot: those that a run of a task looks at, or, if that is -1, those that all runs share.
typedef struct {
    i64 run, slot, from, to;
} Stretch;

static Stretch stretch_of(const Contexts *contexts, const int32_t *task, i64 run) {
    const int32_t *fields = contexts->runs + (task[TASK_RUN] + MAX(run, 0)) * RUN_FIELDS;
    if (run < 0) return (Stretch){run, fields[RUN_SLOT], 0, task[TASK_SHARED]};
    // Spans begin at the same positions whatever is computed together, so that sums are the same.
    const i64 first = contexts->window ? MAX(0, fields[RUN_POSITION] - contexts->window + 1) / SPAN * SPAN : 0;
    const i64 last = fields[RUN_POSITION] + fields[RUN_COUNT];
    return (Stretch){run, fields[RUN_SLOT], MAX(first, task[TASK_SHARED]), last};
}

static i64 first_run(const int32_t *task) { return task[TASK_SHARED] ? -1 : 0; }

// The places of the first span of a stretch.
static void find_places(const Attention *job, i64 head, Stretch stretch, Places *places) {
    const Contexts *contexts = job->contexts;
    const i64 row = contexts->kv_heads * contexts->size;
    const i64 *pages = contexts->page_table + stretch.slot * contexts->pages_per_slot;
    i64 page = stretch.from / contexts->page_size, left = contexts->page_size - stretch.from % contexts->page_size;
    i64 at = stretch.from < stretch.to
                 ? ((pages[page] + 1) * contexts->page_size - left) * row + head * contexts->size
                 : 0;
    for (i64 i = 0; i < SPAN; i++, at += row, left--) {
        if (stretch.from + i >= stretch.to) {
            places->at[i] = -1;
            continue;
        }
        if (!left) {
            at = pages[++page] * contexts->page_size * row + head * contexts->size;
            left = contexts->page_size;
        }
        places->at[i] = at;
    }
}

// Where tiles of the first head's keys begin, 16 tokens each: in the pages, if one holds them all, or else in
// `queries->keys`, whose rows are like those of pages. What is behind the last token is not read: memory that nobody has written yet
// would be given out twice, to be read and to be written.
typedef struct {
    const bf16 *tiles[SPAN / 16];
} Keys;

static Keys find_keys(const Queries *queries, const Places *places) {
    const Attention *job = queries->job;
    const Contexts *contexts = job->contexts;
    const i64 row = contexts->kv_heads * contexts->size;
    Keys keys;
    for (i64 i = 0; i < SPAN; i += 16) {
        bf16 *copy = queries->keys + i * row;
        const int is_whole = contexts->page_size % 16 == 0 && places->at[i + 15] >= 0;
        keys.tiles[i / 16] = is_whole ? job->keys + places->at[i] : copy;
        if (is_whole) continue;
        for (i64 token = i; token < i + 16 && places->at[token] >= 0; token++, copy += row)
            memcpy(copy, job->keys + places->at[token], (size_t)(job->together * contexts->size) * sizeof(bf16));
    }
    return keys;
}

static inline __m512i row_at(const bf16 *rows, i64 place) {
    return place < 0 ? _mm512_setzero_si512() : _mm512_loadu_si512(rows + place);
}

// Brings values of a span into tiles, those behind the last token as zeros. Memory is asked for the next span.
static void fetch_values(const Queries *queries, const Places *places, const Places *next, i64 tokens) {
    const Attention *job = queries->job;
    const i64 size = job->contexts->size;
    for (i64 token = 0; token < tokens; token += 2) {
        const i64 even = places->at[token], odd = places->at[token + 1];
        bf16 *value = queries->values + token / 32 * size * 32 + token % 32 * 16;
        for (i64 head = 0; head < job->together; head++, value += (SPAN - 32) * size)
            for (i64 at = head * size; at < (head + 1) * size; at += 32, value += 1024) {
                const __m512i first = row_at(job->values + at, even), second = row_at(job->values + at, odd);
                _mm512_store_si512(value, _mm512_unpacklo_epi16(first, second));
                _mm512_store_si512(value + 512, _mm512_unpackhi_epi16(first, second));
            }
        for (i64 i = token; i < token + 2; i++)
            for (i64 at = next->at[i], end = at + job->together * size; next->at[i] >= 0 && at < end; at += 32) {
                _mm_prefetch((const char *)(job->keys + at), _MM_HINT_T1);
                _mm_prefetch((const char *)(job->values + at), _MM_HINT_T1);
            }
    }
}
