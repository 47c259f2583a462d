// The mini guest: the Linux guest's working set and reports without a kernel,
// for accelerators that run 32-bit code only. One loop, no interrupts unless it
// idles, no paging, time by the TSC calibrated on the PIT.
//
// Command line (after the file name): ws=MiB rate=pages/s (0: unlimited)
// dirty=MiB sweep=pages/s words=n tick=ms report=ms beat=us
// corrupt=word|stale|early|counter:<seconds>; the meaning is that of GD_<NAME>
// of the Linux guest, and so are the lines on the console (COM1).
// burst=<busy>:<quiet> writes for so many seconds and then does not, in turn.
// idle=1 halts until the next 5 ms are over whenever there is nothing to do; without
// it the guest spins, and sees how long it was not let run.
// power=off|panic is what the power button does; without it, nothing. words is 16 if
// not given: a KVM that emulates 32-bit code takes about a microsecond for each
// instruction, and writing all 1024 words of a page milliseconds.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef enum { false, true } bool;

enum { PAGE = 4096, WORDS = PAGE / 4, MEMBERS = 4, JOURNAL = 1024 };
#define MAGIC 0x636b6d69u
#define STEP 0x9e3779b1u // odd: word i of a page is base + i*STEP
#define FIRST 0x1000000u // the working set begins at 16 MiB

static inline void outb(u16 port, u8 v) { __asm__ volatile("outb %0, %1" : : "a"(v), "Nd"(port) : "memory"); }
static inline u8 inb(u16 port) {
	u8 v;
	__asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port) : "memory");
	return v;
}
static inline void outw(u16 port, u16 v) { __asm__ volatile("outw %0, %1" : : "a"(v), "Nd"(port) : "memory"); }
static inline u16 inw(u16 port) {
	u16 v;
	__asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port) : "memory");
	return v;
}
static inline u64 rdtsc(void) {
	u64 v;
	__asm__ volatile("rdtsc" : "=A"(v));
	return v;
}

// div64 is n / d and *rem = n % d without libgcc, of which a 64-bit compiler
// brings no 32-bit edition.
static u64 div64(u64 n, u32 d, u32 *rem) {
	u32 high = (u32)(n >> 32), low = (u32)n, qh = high / d, ql, r = high % d;
	__asm__("divl %4" : "=a"(ql), "=d"(r) : "0"(low), "1"(r), "rm"(d));
	if (rem)
		*rem = r;
	return (u64)qh << 32 | ql;
}

void *memset(void *p, int c, u32 n) {
	for (u8 *b = p; n--;)
		*b++ = (u8)c;
	return p;
}
void *memcpy(void *to, const void *from, u32 n) {
	u8 *t = to;
	for (const u8 *f = from; n--;)
		*t++ = *f++;
	return to;
}

// ---- console -----------------------------------------------------------

enum { COM1 = 0x3f8 };
static char line[256];
static u32 line_len;

static void put(char c) {
	if (line_len < sizeof line - 8)
		line[line_len++] = c;
}
static void text(const char *s) {
	while (*s)
		put(*s++);
}
static void number(u64 v) {
	char digits[20];
	u32 n = 0, r;
	do {
		v = div64(v, 10, &r);
		digits[n++] = (char)('0' + r);
	} while (v);
	while (n)
		put(digits[--n]);
}
static void field(const char *name, u64 v) {
	put(' ');
	text(name);
	put('=');
	number(v);
}

// end sends the line with the checksum of the Linux guest's reports. The UART
// takes 16 bytes whenever its FIFO is empty, so it is asked once per 16.
static void end(void) {
	u32 h = 2166136261u;
	for (u32 i = 0; i < line_len; i++)
		h = (h ^ (u8)line[i]) * 16777619u;
	h = (h ^ h >> 16) & 0xffff;
	line[line_len++] = ' ';
	line[line_len++] = '*';
	for (int shift = 12; shift >= 0; shift -= 4)
		line[line_len++] = "0123456789abcdef"[h >> shift & 15];
	line[line_len++] = '\n';
	for (u32 i = 0; i < line_len; i++) {
		if (i % 16 == 0)
			while (!(inb(COM1 + 5) & 0x20))
				;
		outb(COM1, (u8)line[i]);
	}
	line_len = 0;
}

static void console_init(void) {
	outb(COM1 + 1, 0);
	outb(COM1 + 3, 0x80);
	outb(COM1, 1); // 115200
	outb(COM1 + 1, 0);
	outb(COM1 + 3, 3);
	outb(COM1 + 2, 0xc7); // FIFOs on
}

// ---- time --------------------------------------------------------------

static u32 ticks_per_ms;
static u64 started;

// One-shots of PIT channel 2, whose output can be read at port 0x61. On a busy host the
// end of one may be seen late; the shortest of three was not.
static void calibrate(void) {
	enum { MS = 17, COUNT = 20284 };
	u64 best = 0;
	for (int i = 0; i < 3; i++) {
		outb(0x61, (u8)((inb(0x61) & ~2) | 1));
		outb(0x43, 0xb0);
		outb(0x42, COUNT & 255);
		outb(0x42, COUNT >> 8);
		u64 a = rdtsc();
		while (!(inb(0x61) & 0x20))
			;
		started = rdtsc();
		if (!best || started - a < best)
			best = started - a;
	}
	ticks_per_ms = (u32)div64(best, MS, 0);
	if (!ticks_per_ms)
		ticks_per_ms = 1;
}
static u64 micros_of(u64 ticks) { return div64(ticks * 1000, ticks_per_ms, 0); }
static u64 now_us(void) {
	// Split, so that ticks*1000 cannot overflow after weeks.
	u32 rem;
	u64 ms = div64(rdtsc() - started, ticks_per_ms, &rem);
	return ms * 1000 + micros_of(rem);
}

// ---- command line ------------------------------------------------------

static const char *cmdline = "";

static const char *arg_text(const char *name) {
	for (const char *c = cmdline; *c; c++) {
		if (c != cmdline && c[-1] != ' ')
			continue;
		const char *a = c, *b = name;
		while (*b && *a == *b)
			a++, b++;
		if (!*b && *a == '=')
			return a + 1;
	}
	return 0;
}
static u32 parse(const char *s) {
	u32 v = 0;
	while (*s >= '0' && *s <= '9')
		v = v * 10 + (u32)(*s++ - '0');
	return v;
}
static u32 arg(const char *name, u32 fallback) {
	const char *s = arg_text(name);
	return s ? parse(s) : fallback;
}

// ---- working set: see the Linux guest's ws.c for the invariants ----------

static struct entry { u32 seq, op; } *table;
static struct note { u32 group, seq; } journal[JOURNAL] __attribute__((aligned(PAGE)));
static volatile u32 front[WORDS] __attribute__((aligned(PAGE))), back[WORDS] __attribute__((aligned(PAGE)));
static u32 *mem, groups, writable, stride, op, rng = 2463534242u, sweep_at, sweeps;
static u64 written, verified, bad;
static enum { RANDOM, SEQUENTIAL, HOT } pattern;
static enum { NONE, WORD, STALE, EARLY, COUNTER } corrupt;
static const char *const corrupt_names[] = {"none", "word", "stale", "early", "counter"};

static u32 mix32(u32 x) { // Murmur3's finalizer (Appleby)
	x ^= x >> 16, x *= 0x85ebca6bu, x ^= x >> 13, x *= 0xc2b2ae35u;
	return x ^ x >> 16;
}
static u32 page_of(u32 group, u32 member) {
	static const u32 prime[MEMBERS] = {1, 2147483647u, 2147483629u, 2147483587u};
	u32 rem;
	div64((u64)group * prime[member], groups, &rem);
	return member * groups + rem;
}
static u32 base_of(u32 page, u32 seq, u32 o) { return mix32(page + 1) ^ mix32(seq * STEP + o); }

static void write_page(u32 page, u32 seq, u32 o) {
	volatile u32 *w = mem + page * WORDS;
	u32 base = base_of(page, seq, o);
	w[0] = MAGIC ^ page;
	w[1] = seq;
	w[2] = o;
	for (u32 i = 3; i < WORDS; i += stride)
		w[i] = base + i * STEP;
	w[WORDS - 1] = base + (WORDS - 1) * STEP;
}

static void complain(const char *kind, u32 page, u32 word, u32 got, u32 want) {
	if (bad++ >= 16)
		return;
	text("BAD kind=");
	text(kind);
	field("page", page);
	field("word", word);
	field("got", got);
	field("want", want);
	field("op", op);
	field("va", (u32)(mem + page * WORDS));
	end();
}

static bool check_page(u32 page, u32 seq, u32 o) {
	const volatile u32 *w = mem + page * WORDS;
	u32 base = base_of(page, seq, o), head[3] = {MAGIC ^ page, seq, o};
	for (u32 i = 0; i < 3; i++)
		if (w[i] != head[i]) {
			complain(i ? "mixed-time" : "foreign", page, i, w[i], head[i]);
			return false;
		}
	for (u32 i = 3;; i += stride) {
		if (i >= WORDS)
			i = WORDS - 1;
		if (w[i] != base + i * STEP) {
			complain("torn", page, i, w[i], base + i * STEP);
			return false;
		}
		if (i == WORDS - 1)
			return true;
	}
}

static bool check_group(u32 group) {
	struct entry e = table[group];
	bool ok = true;
	for (u32 m = 0; m < MEMBERS; m++)
		if (!check_page(page_of(group, m), e.seq, e.op))
			ok = false;
	if (e.op > op) {
		complain("table-ahead", page_of(group, 0), 0, e.op, op);
		ok = false;
	} else if (e.op && op - e.op < JOURNAL) {
		struct note *j = &journal[e.op % JOURNAL];
		if (j->group != group || j->seq != e.seq) {
			complain("journal", page_of(group, 0), 0, j->group, group);
			ok = false;
		}
	}
	verified += MEMBERS;
	return ok;
}

static void commit(u32 group) {
	u32 o = ++op, seq = table[group].seq + 1;
	front[0] = o;
	for (u32 m = 0; m < MEMBERS; m++)
		write_page(page_of(group, m), seq, o);
	*(volatile struct entry *)&table[group] = (struct entry){seq, o};
	*(volatile struct note *)&journal[o % JOURNAL] = (struct note){group, seq};
	back[0] = o;
	written += MEMBERS;
}
static void verify(u32 group) {
	if (!check_group(group))
		commit(group);
}
static void update(u32 group) {
	if (front[0] != op || back[0] != op)
		complain("counter", 0, 0, front[0], op);
	verify(group);
	commit(group);
}
static u32 random(void) {
	rng ^= rng << 13, rng ^= rng >> 17, rng ^= rng << 5; // xorshift32 (Marsaglia 2003)
	return rng;
}
static u32 pick(void) {
	if (pattern == SEQUENTIAL)
		return op % writable;
	if (pattern == HOT && random() % 10) // nine of ten to a sixteenth of the groups
		return random() % (writable / 16 ? writable / 16 : 1);
	return random() % writable;
}

static void break_one(void) {
	static u32 keep[WORDS];
	u32 g = pick(), p = page_of(g, 2), *w = mem + p * WORDS;
	text("CORRUPT kind=");
	text(corrupt_names[corrupt]);
	field("page", p);
	end();
	switch (corrupt) {
	case WORD:
		w[3 + 25 * stride] ^= 1;
		break;
	case STALE:
		memcpy(keep, w, PAGE);
		update(g);
		memcpy(w, keep, PAGE);
		break;
	case EARLY:
		write_page(p, table[g].seq + 1, op + 1);
		break;
	case COUNTER:
		front[0] = op + 1;
		break;
	case NONE:
		return;
	}
	corrupt = NONE;
}

// ---- the gap measurer, called between any two steps of the loop -----------

static u64 last_look, longest, beat_ticks, beat_next, laps;
static u32 beats;

static void look(void) {
	u64 now = rdtsc();
	if (now - last_look > longest)
		longest = now - last_look;
	last_look = now;
	laps++;
	if (beat_ticks && now >= beat_next) {
		outb(0xe9, (u8)beats++);
		beat_next = now + beat_ticks;
	}
}

// ---- idling: the PIT's channel 0 ends a halt, by the first PIC -------------

enum { PIC = 0x20, SECOND_PIC = 0xa0, TIMER_VECTOR = 32, PIT_HZ = 1193182, WAKE_HZ = 200 };

void on_timer(void); // boot.S

static void idle_init(void) {
	static struct { u16 low, selector, type, high; } gates[TIMER_VECTOR + 1] __attribute__((aligned(8)));
	static struct __attribute__((packed)) { u16 limit; u32 base; } idtr;
	u32 at = (u32)on_timer;
	gates[TIMER_VECTOR].low = (u16)at;
	gates[TIMER_VECTOR].selector = 8;
	gates[TIMER_VECTOR].type = 0x8e00; // present, interrupt gate
	gates[TIMER_VECTOR].high = (u16)(at >> 16);
	idtr.limit = sizeof gates - 1;
	idtr.base = (u32)gates;
	__asm__ volatile("lidt %0" : : "m"(idtr) : "memory");
	static const u8 words[] = {TIMER_VECTOR, 4, 1, 0xfe}; // vectors, where the second is, 8086, only line 0
	outb(PIC, 0x11);
	for (u32 i = 0; i < sizeof words; i++)
		outb(PIC + 1, words[i]);
	outb(SECOND_PIC + 1, 0xff);
	outb(0x43, 0x34); // channel 0, rate generator
	outb(0x40, PIT_HZ / WAKE_HZ & 255);
	outb(0x40, PIT_HZ / WAKE_HZ >> 8);
}
// sti lets interrupts in after the next instruction, which is in the halt already.
static void halt(void) { __asm__ volatile("sti\n\thlt" : : : "memory"); }

// ---- the power button: ACPI registers, where SeaBIOS puts them on pc and q35 --------

enum { PM_STATUS = 0x600, PM_ENABLE = 0x602, PM_CONTROL = 0x604, PVPANIC = 0x505, BUTTON = 1 << 8, SLEEP = 1 << 13 };

static void power_arm(void) {
	outw(PM_STATUS, BUTTON); // a one clears it
	outw(PM_ENABLE, BUTTON);
}
static void power_look(char what) {
	if (!(inw(PM_STATUS) & BUTTON))
		return;
	if (what == 'p')
		outb(PVPANIC, 1);
	else
		outw(PM_CONTROL, SLEEP); // type 0, which is S5 there
	outw(PM_STATUS, BUTTON);
}

struct multiboot_info { u32 flags, mem_lower, mem_upper, boot_device, cmdline; };

void mini_main(u32 magic, const struct multiboot_info *info) {
	console_init();
	if (magic == 0x2badb002u && info->flags & 4)
		cmdline = (const char *)info->cmdline;
	calibrate();
	u32 ws = arg("ws", 16), rate = arg("rate", 1000), dirty = arg("dirty", 0), words = arg("words", 16);
	u32 tick_us = arg("tick", 100) * 1000, report_us = arg("report", 250) * 1000;
	if (words < 8 || words > WORDS)
		words = WORDS;
	stride = WORDS / words;
	const char *order = arg_text("pattern");
	pattern = !order || *order == 'r' ? RANDOM : *order == 's' ? SEQUENTIAL : HOT;
	text("INIT up kernel=mini cpus=1");
	field("mono_us", now_us());
	field("tsc_khz", ticks_per_ms);
	end();

	// Working set, then table, from 16 MiB to what the loader says is there.
	u32 room = info->flags & 1 ? (info->mem_upper >> 10) + 1 : 32; // MiB
	if (room < 20 || ws + 1 + ws / 64 > room - 16) {
		text("FATAL ws=");
		number(ws);
		text(" does not fit");
		end();
		return;
	}
	mem = (u32 *)FIRST;
	groups = ws * ((1 << 20) / PAGE / MEMBERS);
	table = (struct entry *)(FIRST + ws * (1u << 20));
	for (u32 g = 0; g < groups; g++) {
		table[g].seq = table[g].op = 0;
		for (u32 m = 0; m < MEMBERS; m++)
			write_page(page_of(g, m), 0, 0);
	}
	writable = dirty ? dirty * ((1 << 20) / PAGE / MEMBERS) : groups;
	if (writable > groups)
		writable = groups;
	u32 all = groups * MEMBERS, sweep_rate = arg("sweep", all / 2 < 1024 ? all / 2 : 1024);
	const char *c = arg_text("corrupt");
	u64 corrupt_at = 0;
	for (u32 k = WORD; c && k <= COUNTER; k++) {
		u32 i = 0;
		while (corrupt_names[k][i] && corrupt_names[k][i] == c[i])
			i++;
		if (!corrupt_names[k][i]) {
			corrupt = k;
			corrupt_at = now_us() + 1000000ull * (c[i] == ':' ? parse(c + i + 1) : 3);
		}
	}
	if (groups) {
		text("WSREADY");
		field("pages", all);
		field("members", MEMBERS);
		field("threads", 1);
		field("dirty_pages", writable * MEMBERS);
		field("rate", rate);
		field("words", WORDS / stride);
		field("mono_us", now_us());
		end();
	}
	text("READY");
	field("mono_us", now_us());
	end();

	bool idle = arg("idle", 0);
	if (idle)
		idle_init();
	const char *power = arg_text("power"), *burst = arg_text("burst");
	if (power)
		power_arm();
	u32 busy_us = burst ? parse(burst) * 1000000 : 0, quiet_us = 0;
	for (; burst && *burst && *burst != ' '; burst++)
		if (*burst == ':')
			quiet_us = parse(burst + 1) * 1000000;

	beat_ticks = div64((u64)arg("beat", 0) * ticks_per_ms, 1000, 0);
	last_look = beat_next = rdtsc();
	u64 begin = now_us(), tick_at = begin, report_at = begin, gap_at = begin + 1000000, n = 0;
	u64 wrote = 0, swept = 0, late = 0;
	for (;;) {
		u64 now = now_us(), elapsed = now - begin;
		u64 due = rate ? div64(elapsed * rate, 1000000, 0) : wrote + 64;
		if (rate && due > wrote + rate / 5 + 64) { // forgive debt older than 200 ms
			late += due - wrote - rate / 5 - 64;
			wrote = due - rate / 5 - 64;
		}
		u32 phase = 0;
		if (quiet_us)
			div64(elapsed, busy_us + quiet_us, &phase);
		if (phase > busy_us)
			wrote = due;
		for (u32 i = 0; groups && wrote < due && i < 32; i++, wrote += MEMBERS) {
			update(pick());
			look();
		}
		u64 sweep_due = div64(elapsed * sweep_rate, 1000000, 0);
		if (sweep_due > swept + sweep_rate / 5 + 64)
			swept = sweep_due - sweep_rate / 5 - 64;
		for (u32 i = 0; groups && swept < sweep_due && i < 16; i++, swept += MEMBERS) {
			verify(sweep_at);
			if (++sweep_at == groups)
				sweep_at = 0, sweeps++;
			look();
		}
		if (corrupt && now >= corrupt_at)
			break_one();
		if (power)
			power_look(*power);
		look();
		if (now >= tick_at) {
			text("TICK ");
			number(n++);
			field("mono_us", now);
			end();
			tick_at = tick_at + tick_us > now ? tick_at + tick_us : now + tick_us;
			last_look = rdtsc(); // the time the console takes is no gap
		}
		if (groups && now >= report_at) {
			text("WS w=");
			number(written);
			field("bad", bad);
			field("seq", op);
			field("v", verified);
			field("sweeps", sweeps);
			field("late", late);
			field("mono_us", now);
			end();
			report_at = report_at + report_us > now ? report_at + report_us : now + report_us;
			last_look = rdtsc();
		}
		if (now >= gap_at) {
			text("GAP max_us=");
			number(micros_of(longest));
			field("laps", laps);
			field("beats", beats);
			end();
			longest = 0;
			gap_at = now + 1000000;
			last_look = rdtsc();
		}
		if (rate && wrote >= due) {
			if (idle && (!groups || swept >= sweep_due))
				halt();
			else
				__asm__ volatile("pause");
		}
	}
}
