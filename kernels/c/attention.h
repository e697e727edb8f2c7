// Attention to contexts in pages.

// Where the first head's keys and values of each token of a span begin; those behind the last are at -1.
typedef struct {
    i64 at[SPAN];
} Places;

static void find_places(const Attention *job, i64 head, i64 slot, i64 from, i64 to, Places *places) {
    const Contexts *contexts = job->contexts;
    const i64 row = contexts->kv_heads * contexts->size;
    const i64 *pages = contexts->page_table + slot * contexts->pages_per_slot;
    i64 page = from / contexts->page_size, left = contexts->page_size - from % contexts->page_size, at = 0;
    if (from < to) at = ((pages[page] + 1) * contexts->page_size - left) * row + head * contexts->size;
    for (i64 i = 0; i < SPAN; i++, at += row, left--) {
        if (from + i >= to) {
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

static inline __m512i row_at(const bf16 *rows, i64 place) {
    return place < 0 ? _mm512_setzero_si512() : _mm512_loadu_si512(rows + place);
}

// Brings keys and values of a span into tiles, those behind the last token as zeros. Memory is asked for the next span.
static void fetch(const Queries *queries, const Places *places, const Places *next, i64 tokens) {
    const Attention *job = queries->job;
    const i64 size = job->contexts->size;
    for (i64 token = 0; token < tokens; token += 2) {
        const i64 even = places->at[token], odd = places->at[token + 1];
        bf16 *key = queries->keys + token / 16 * size * 16 + token % 16 * 32;
        bf16 *value = queries->values + token / 32 * size * 32 + token % 32 * 16;
        for (i64 head = 0; head < job->together; head++, key += (SPAN - 16) * size, value += (SPAN - 32) * size)
            for (i64 at = head * size; at < (head + 1) * size; at += 32, key += 512, value += 1024) {
                _mm512_store_si512(key, row_at(job->keys + at, even));
                _mm512_store_si512(key + 32, row_at(job->keys + at, odd));
                const __m512i first = row_at(job->values + at, even), second = row_at(job->values + at, odd);
                _mm512_store_si512(value, _mm512_unpacklo_epi16(first, second));
                _mm512_store_si512(value + 512, _mm512_unpackhi_epi16(first, second));
                for (i64 i = token; i < token + 2; i++) {
                    if (next->at[i] < 0) continue;
                    _mm_prefetch((const char *)(job->keys + next->at[i] + at), _MM_HINT_T1);
                    _mm_prefetch((const char *)(job->values + next->at[i] + at), _MM_HINT_T1);
                }
            }
    }
}

// Scores of the keys of a span with a unit.
static void score(const Queries *queries, i64 unit, float *scores) {
    const i64 size = queries->job->contexts->size, tile = 16 * size;
    clear_sums();
    for (i64 head = first_head(queries, unit); head <= last_head(queries, unit); head++) {
        const bf16 *q = q_of(queries, unit, head), *keys = queries->keys + head * SPAN * size;
        for (i64 part = 0; part < size / 32; part++, q += 512, keys += 512) {
            LOAD(4, q, 64);
            LOAD(5, keys, 64);
            MULTIPLY_ADD(0, 5, 4);
            LOAD(6, keys + tile, 64);
            MULTIPLY_ADD(1, 6, 4);
            LOAD(5, keys + 2 * tile, 64);
            MULTIPLY_ADD(2, 5, 4);
            LOAD(6, keys + 3 * tile, 64);
            MULTIPLY_ADD(3, 6, 4);
        }
    }
    STORE(0, scores, 64);
    STORE(1, scores + 256, 64);
    STORE(2, scores + 512, 64);
    STORE(3, scores + 768, 64);
}

// Adds the values of a span to what a unit has.
static void add_values(const Queries *queries, i64 unit, i64 tokens) {
    const i64 size = queries->job->contexts->size;
    LOAD(4, queries->shares, 64);
    if (tokens > 32) LOAD(5, queries->shares + 512, 64);
    for (i64 head = first_head(queries, unit); head <= last_head(queries, unit); head++) {
        const bf16 *values = queries->values + head * SPAN * size;
        float *sums = sums_of(queries, unit, head);
        for (i64 d = 0; d < size; d += 32, values += 1024, sums += 512) {
            LOAD(0, sums, 64);
            LOAD(1, sums + 256, 64);
            LOAD(2, values, 64);
            MULTIPLY_ADD(0, 4, 2);
            LOAD(3, values + 512, 64);
            MULTIPLY_ADD(1, 4, 3);
            if (tokens > 32) {
                LOAD(2, values + 32 * size, 64);
                MULTIPLY_ADD(0, 5, 2);
                LOAD(3, values + 32 * size + 512, 64);
                MULTIPLY_ADD(1, 5, 3);
            }
            STORE(0, sums, 64);
            STORE(1, sums + 256, 64);
        }
    }
}

// Adds the values of a span, each as much as its score says.
static void add(const Queries *queries, i64 unit, i64 tokens, const float *scores, Sight sight) {
    weigh(queries, unit, tokens, scores, sight);
    add_values(queries, unit, tokens);
}

// The rows of a run, or of all, against tokens `from` to `to` of a slot. `next` is read ahead after the last span.
static void attend(const Queries *queries, i64 run, i64 slot, i64 from, i64 to, const Places *next) {
    const i64 units = (queries->rows + LANES - 1) / LANES;
    Places places[2];
    int at = 0;
    if (from < to) find_places(queries->job, queries->head, slot, from, to, places);
    for (; from < to; from += SPAN, at ^= 1) {
        const i64 until = MIN(to, from + SPAN), tokens = (until - from + 31) / 32 * 32;
        if (until < to) find_places(queries->job, queries->head, slot, until, to, places + (at ^ 1));
        fetch(queries, places + at, until < to ? places + (at ^ 1) : next, tokens);
        // The next unit is scored before this one is weighed: neither waits for what it has just written.
        Sight sight[2];
        i64 waiting = -1;
        int place = 0;
        for (i64 unit = 0; unit < units; unit++) {
            sight[place] = sight_of(queries, unit, run, from, until);
            if (!sees_any(sight[place])) continue;
            score(queries, unit, queries->scores + place * SPAN * LANES);
            place ^= 1;
            if (waiting >= 0) add(queries, waiting, tokens, queries->scores + place * SPAN * LANES, sight[place]);
            waiting = unit;
        }
        place ^= 1;
        if (waiting >= 0) add(queries, waiting, tokens, queries->scores + place * SPAN * LANES, sight[place]);
    }
}

static void attention_task(void *shared, i64 index, char *memory) {
    const Attention *job = shared;
    const Contexts *contexts = job->contexts;
    const i64 parts = contexts->kv_heads / job->together, next = MIN(index + 1, parts * contexts->num_tasks - 1);
    const int32_t *task = contexts->tasks + index / parts * TASK_FIELDS;
    const int32_t *runs = contexts->runs + task[TASK_RUN] * RUN_FIELDS;
    const int32_t *after = contexts->runs + contexts->tasks[next / parts * TASK_FIELDS + TASK_RUN] * RUN_FIELDS;
    Places places;
    find_places(job, next % parts * job->together, after[RUN_SLOT], 0, after[RUN_POSITION] + after[RUN_COUNT], &places);
    Queries queries = {.job = job, .head = index % parts * job->together};
    lay_out(&queries, memory, rows_of(contexts, task), job->together, contexts->size);
    configure_rows(16, 16);
    name_rows(&queries, runs, task[TASK_COUNT]);
    copy_queries(&queries);
    const i64 units = (queries.rows + LANES - 1) / LANES;
    memset(queries.sums, 0, (size_t)(units * queries.most * contexts->size * LANES) * sizeof(float));
    if (task[TASK_SHARED]) attend(&queries, -1, runs[RUN_SLOT], 0, task[TASK_SHARED], &places);
    for (i64 i = 0; i < task[TASK_COUNT]; i++, runs += RUN_FIELDS) {
        // Spans begin at the same positions whatever is computed together, so that sums are the same.
        const i64 first = contexts->window ? MAX(0, runs[RUN_POSITION] - contexts->window + 1) / SPAN * SPAN : 0;
        const i64 last = runs[RUN_POSITION] + runs[RUN_COUNT];
        attend(&queries, i, runs[RUN_SLOT], MAX(first, task[TASK_SHARED]), last, &places);
    }
    copy_results(&queries);
}

static int attend_all(const Contexts *contexts, const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *out,
                      int form) {
    // Key/value heads of a token lie side by side: one thread reads them all, if there is enough else to do.
    const int all = contexts->num_tasks >= 4 * max_threads() && contexts->kv_heads <= MOST_TOGETHER;
    Attention job = {q, keys, values, out, contexts, all ? contexts->kv_heads : 1, form};
    Queries queries;
    size_t most = 0;
    for (i64 i = 0; i < contexts->num_tasks; i++) {
        const i64 each = rows_of(contexts, contexts->tasks + i * TASK_FIELDS);
        most = MAX(most, lay_out(&queries, NULL, each, job.together, contexts->size));
    }
    return run(attention_task, &job, contexts->num_tasks * (contexts->kv_heads / job.together), 4, most);
}

int treadle_attention(const Contexts *contexts, const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *out) {
    return attend_all(contexts, q, keys, values, out, ROWS);
}
