// The working set: pages whose content proves when, and in which order, each of
// them was written.
//
// Pages form groups of four members. Every group update is one *operation*,
// numbered from 1 without gaps, and writes in this documented order:
//
//   1. front = op                       (a page of its own)
//   2. members 0, 1, 2, 3 of the group, whole pages, in this order
//   3. table[group] = {seq, op}         (in the table's pages)
//   4. journal[op % JOURNAL] = {group, seq}
//   5. back = op                        (a page of its own)
//
// Member pages hold words derived from (page, seq, op) in every eighth byte, so
// a page of which one part is older than the other does not fit itself. A page
// that fits itself but is of another moment than the rest does not fit the
// table, the journal, the counters or the registers of the thread that wrote
// it: one page taken a single operation too early or too late shows. The four
// members lie a quarter of the working set apart, permuted, so that a copy that
// walks through memory meets them at very different times.
//
// Before a group is written it is read and verified completely; a sweep
// verifies all groups again and again, whether written or not. An auditor on
// another vCPU may check the order 2 from outside while it happens.
//
// GD_CORRUPT=<kind>:<seconds> is the negative control: it breaks exactly one
// page once, in the way named, and `bad` has to rise.
#include "guestd.h"
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MEMBERS = 4, WORDS = PAGE / 8, JOURNAL = 4096, MAX_THREADS = 8 };
#define MAGIC 0x636b6167656e7421ull
#define STEP 0x9e3779b97f4a7c15ull // odd: word i of a page is base + i*STEP

struct entry { u64 seq, op; };
struct note { u64 group, seq; };

// One writer and everything it owns; nobody else writes any of it.
struct set {
	unsigned id;
	u64 *mem;          // groups*MEMBERS pages
	u64 groups;        // all groups
	u64 writable;      // the groups from 0 up to this are rewritten
	struct entry *table;
	struct note *journal;
	volatile u64 *front, *back; // one page each
	u64 op, rng, sweep;
	unsigned stride; // every stride-th word depends on seq; 1: all of them
	_Atomic u64 written, verified, bad, ops, sweeps, late;
};

static struct set sets[MAX_THREADS];
static unsigned nsets;
static u64 rate;       // pages per second and thread; 0: as fast as it goes
static u64 sweep_rate; // pages per second and thread
static enum { RANDOM, SEQUENTIAL, HOT } pattern;
static enum { NONE, WORD, STALE, EARLY, COUNTER } corrupt;
static u64 corrupt_at_ns;
static const char *const corrupt_names[] = {"none", "word", "stale", "early", "counter"};

static void *pages(u64 bytes) {
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (p == MAP_FAILED)
		fatal("working set");
	return p;
}

// Each member has its own quarter, permuted by a prime that is larger than any
// quarter's divisors, so the map is a bijection.
static u64 page_of(const struct set *s, u64 group, unsigned member) {
	static const u64 prime[MEMBERS] = {1, 2147483647ull, 2147483629ull, 2147483587ull};
	return member * s->groups + group * prime[member] % s->groups;
}

static inline u64 base_of(const struct set *s, u64 page, u64 seq, u64 op) {
	return mix64(page * MEMBERS + s->id + 1) ^ mix64(seq * STEP + op);
}

static void write_page(struct set *s, u64 page, u64 seq, u64 op) {
	volatile u64 *w = s->mem + page * WORDS; // volatile: in this order, every word
	u64 base = base_of(s, page, seq, op);
	w[0] = MAGIC ^ page;
	w[1] = seq;
	w[2] = op;
	if (s->stride == 1) {
		u64 v = base + 3 * STEP;
		for (unsigned i = 3; i < WORDS; i++, v += STEP)
			w[i] = v;
	} else {
		for (unsigned i = 3; i < WORDS; i += s->stride)
			w[i] = base + i * STEP;
		w[WORDS - 1] = base + (WORDS - 1) * STEP;
	}
}

static void complain(struct set *s, const char *kind, u64 page, unsigned word, u64 got, u64 want) {
	u64 n = atomic_fetch_add(&s->bad, 1);
	if (n < 16)
		say("BAD kind=%s set=%u page=%llu word=%u got=%llx want=%llx op=%llu va=%llx", kind, s->id,
		    (unsigned long long)page, word, (unsigned long long)got, (unsigned long long)want,
		    (unsigned long long)s->op, (unsigned long long)(uintptr_t)(s->mem + page * WORDS));
}

static bool check_page(struct set *s, u64 page, u64 seq, u64 op) {
	const volatile u64 *w = s->mem + page * WORDS;
	u64 base = base_of(s, page, seq, op);
	const u64 head[3] = {MAGIC ^ page, seq, op};
	for (unsigned i = 0; i < 3; i++)
		if (w[i] != head[i]) {
			complain(s, i == 0 ? "foreign" : "mixed-time", page, i, w[i], head[i]);
			return false;
		}
	u64 diff = w[WORDS - 1] ^ (base + (WORDS - 1) * STEP);
	if (s->stride == 1) {
		u64 v = base + 3 * STEP;
		for (unsigned i = 3; i < WORDS; i++, v += STEP)
			diff |= w[i] ^ v;
	} else
		for (unsigned i = 3; i < WORDS; i += s->stride)
			diff |= w[i] ^ (base + i * STEP);
	if (!diff)
		return true;
	for (unsigned i = 3; i < WORDS; i += s->stride)
		if (w[i] != base + i * STEP) {
			complain(s, "torn", page, i, w[i], base + i * STEP);
			return false;
		}
	complain(s, "torn", page, WORDS - 1, w[WORDS - 1], base + (WORDS - 1) * STEP);
	return false;
}

static bool check_group(struct set *s, u64 group) {
	struct entry e = s->table[group];
	bool ok = true;
	for (unsigned m = 0; m < MEMBERS; m++)
		ok &= check_page(s, page_of(s, group, m), e.seq, e.op);
	if (e.op > s->op) {
		complain(s, "table-ahead", page_of(s, group, 0), 0, e.op, s->op);
		ok = false;
	} else if (e.op && s->op - e.op < JOURNAL) {
		struct note j = s->journal[e.op % JOURNAL];
		if (j.group != group || j.seq != e.seq) {
			complain(s, "journal", page_of(s, group, 0), 0, j.group, group);
			ok = false;
		}
	}
	atomic_fetch_add_explicit(&s->verified, MEMBERS, memory_order_relaxed);
	return ok;
}

// commit is one operation, in the documented order.
static void commit(struct set *s, u64 group) {
	u64 op = ++s->op, seq = s->table[group].seq + 1;
	*s->front = op;
	for (unsigned m = 0; m < MEMBERS; m++)
		write_page(s, page_of(s, group, m), seq, op);
	*(volatile struct entry *)&s->table[group] = (struct entry){seq, op};
	*(volatile struct note *)&s->journal[op % JOURNAL] = (struct note){group, seq};
	*s->back = op;
	atomic_fetch_add_explicit(&s->written, MEMBERS, memory_order_relaxed);
	atomic_store_explicit(&s->ops, op, memory_order_relaxed);
}

// A group found bad is complained of and then written anew, so that one broken
// page counts once and the rest of the run keeps its meaning.
static void verify(struct set *s, u64 group) {
	if (!check_group(s, group))
		commit(s, group);
}

static void update(struct set *s, u64 group) {
	if (*s->front != s->op || *s->back != s->op)
		complain(s, "counter", 0, 0, *s->front, s->op);
	verify(s, group);
	commit(s, group);
}

static u64 random_of(struct set *s, u64 n) {
	s->rng ^= s->rng << 13, s->rng ^= s->rng >> 7, s->rng ^= s->rng << 17; // xorshift64 (Marsaglia 2003)
	return s->rng % n;
}

static u64 pick(struct set *s) {
	if (pattern == SEQUENTIAL)
		return s->op % s->writable;
	if (pattern == HOT && random_of(s, 10)) // nine of ten to a sixteenth of the groups
		return random_of(s, s->writable / 16 ? s->writable / 16 : 1);
	return random_of(s, s->writable);
}

static void break_one(struct set *s) {
	static u64 keep[WORDS];
	u64 g = pick(s), p = page_of(s, g, 2), *w = s->mem + p * WORDS;
	say("CORRUPT kind=%s page=%llu", corrupt_names[corrupt], (unsigned long long)p);
	switch (corrupt) {
	case WORD: // one bit, as a copy torn in the middle of a page would have it
		w[3 + 25 * s->stride] ^= 1;
		break;
	case STALE: // a page of an earlier moment, whole in itself
		memcpy(keep, w, PAGE);
		update(s, g);
		memcpy(w, keep, PAGE);
		break;
	case EARLY: // a page of a later moment than the table
		write_page(s, p, s->table[g].seq + 1, s->op + 1);
		break;
	case COUNTER:
		*s->front = s->op + 1;
		break;
	case NONE:
		return;
	}
	corrupt = NONE;
}

static void *writer(void *arg) {
	struct set *s = arg;
	long cpu = s->id % sysconf(_SC_NPROCESSORS_ONLN);
	pin(cpu);
	u64 start = mono_ns(), wrote = 0, swept = 0;
	for (;;) {
		u64 now = mono_ns();
		// Debt older than 200 ms is forgiven: a guest that was stopped or
		// starved goes on at its rate instead of making up for it in a burst.
		double elapsed = (double)(now - start) / 1e9;
		u64 due = rate ? (u64)(elapsed * (double)rate) : wrote + 1024;
		if (rate && due > wrote + rate / 5 + 64) {
			atomic_fetch_add_explicit(&s->late, due - wrote - rate / 5 - 64, memory_order_relaxed);
			wrote = due - rate / 5 - 64;
		}
		for (unsigned n = 0; wrote < due && n < 256; n++, wrote += MEMBERS) {
			update(s, pick(s));
			beat(cpu);
		}
		u64 sweep_due = (u64)(elapsed * (double)sweep_rate);
		if (sweep_due > swept + sweep_rate / 5 + 64)
			swept = sweep_due - sweep_rate / 5 - 64;
		for (unsigned n = 0; swept < sweep_due && n < 64; n++, swept += MEMBERS) {
			verify(s, s->sweep);
			beat(cpu);
			if (++s->sweep == s->groups) {
				s->sweep = 0;
				atomic_fetch_add(&s->sweeps, 1);
			}
		}
		if (corrupt && s->id == 0 && now >= corrupt_at_ns)
			break_one(s);
		if (rate && wrote >= due)
			sleep_until(now + 1000000);
	}
	return NULL;
}

// The auditor reads member sequence numbers against the order of writing: who
// is written earlier is read later, so the numbers may only grow while it
// reads, and the counters likewise.
static void *auditor(void *arg) {
	(void)arg;
	pin((unsigned)sysconf(_SC_NPROCESSORS_ONLN) - 1);
	for (u64 g = 0;; g++) {
		for (unsigned i = 0; i < nsets; i++) {
			struct set *s = &sets[i];
			u64 seq[MEMBERS], group = g % s->groups;
			for (unsigned m = MEMBERS; m-- > 0;) // x86 keeps loads in order
				seq[m] = *(volatile u64 *)(s->mem + page_of(s, group, m) * WORDS + 1);
			for (unsigned m = 1; m < MEMBERS; m++)
				if (seq[m] > seq[m - 1])
					complain(s, "order", page_of(s, group, m), 1, seq[m], seq[m - 1]);
			u64 back = *s->back, front = *s->front;
			if (back > front)
				complain(s, "counters", 0, 0, back, front);
		}
		if (g % 64 == 0)
			sleep_until(mono_ns() + 1000000);
	}
	return NULL;
}

void ws_start(void) {
	u64 mib = param_u64("WS", 0), dirty = param_u64("DIRTY", 0), threads = param_u64("THREADS", 1);
	if (!mib)
		return;
	if (threads < 1 || threads > MAX_THREADS)
		threads = 1;
	rate = param_u64("RATE", 1000) / threads;
	if (param_u64("RATE", 1000) && !rate)
		rate = 1;
	u64 words = param_u64("WORDS", WORDS);
	if (words < 8 || words > WORDS)
		words = WORDS;
	const char *order = param("PATTERN", "random");
	pattern = *order == 's' ? SEQUENTIAL : *order == 'h' ? HOT : RANDOM;
	const char *c = param("CORRUPT", "");
	for (unsigned k = WORD; k <= COUNTER; k++)
		if (!strncmp(c, corrupt_names[k], strlen(corrupt_names[k]))) {
			const char *colon = strchr(c, ':');
			corrupt = k;
			corrupt_at_ns = mono_ns() + (colon ? strtoull(colon + 1, NULL, 10) : 3) * 1000000000ull;
		}
	u64 groups = mib * (1 << 20) / PAGE / MEMBERS / threads;
	// One sweep about every two seconds, at most 64 MiB/s of reading.
	u64 all = groups * MEMBERS, automatic = all / 2 < 16384 / threads ? all / 2 : 16384 / threads;
	sweep_rate = param_u64("SWEEP", automatic * threads) / threads;
	for (unsigned i = 0; i < threads; i++) {
		struct set *s = &sets[i];
		*s = (struct set){.id = i, .groups = groups, .stride = WORDS / words, .rng = mix64(i + 88172645463325252ull)};
		s->mem = pages(groups * MEMBERS * PAGE);
		s->table = pages(groups * sizeof *s->table);
		s->journal = pages(JOURNAL * sizeof *s->journal);
		s->front = pages(PAGE);
		s->back = pages(PAGE);
		s->writable = dirty ? dirty * (1 << 20) / PAGE / MEMBERS / threads : groups;
		if (s->writable > groups || !s->writable)
			s->writable = groups;
		for (u64 g = 0; g < groups; g++)
			for (unsigned m = 0; m < MEMBERS; m++)
				write_page(s, page_of(s, g, m), 0, 0);
	}
	nsets = threads;
	say("WSREADY pages=%llu members=%d threads=%u dirty_pages=%llu rate=%llu words=%u mono_us=%llu",
	    (unsigned long long)(groups * MEMBERS * threads), MEMBERS, nsets,
	    (unsigned long long)(sets[0].writable * MEMBERS * threads), (unsigned long long)(rate * threads),
	    (unsigned)(WORDS / sets[0].stride), (unsigned long long)(mono_ns() / 1000));
	for (unsigned i = 0; i < nsets; i++)
		spawn(writer, &sets[i], "writer");
	if (param_u64("AUDIT", 0))
		spawn(auditor, NULL, "auditor");
}

void ws_report(void) {
	if (!nsets)
		return;
	u64 w = 0, v = 0, bad = 0, ops = 0, late = 0, sweeps = ~0ull;
	for (unsigned i = 0; i < nsets; i++) {
		w += sets[i].written, v += sets[i].verified, bad += sets[i].bad, ops += sets[i].ops;
		late += sets[i].late;
		if (sets[i].sweeps < sweeps) // complete: by the slowest
			sweeps = sets[i].sweeps;
	}
	say("WS w=%llu bad=%llu seq=%llu v=%llu sweeps=%llu late=%llu mono_us=%llu", (unsigned long long)w,
	    (unsigned long long)bad, (unsigned long long)ops, (unsigned long long)v, (unsigned long long)sweeps,
	    (unsigned long long)late, (unsigned long long)(mono_ns() / 1000));
}
