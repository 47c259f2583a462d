// The log writer: records of one block, numbered from 1 without gaps, appended to
// files on the disk, each fsynced before the next one is begun. GD_LOG=<n> writes n
// of them a second (0: as many as go).
//
// What the disk must hold follows from memory, where two numbers lie next to each
// other in a page of their own, which begins with LOG_MAGIC so that it can be found
// in a copy of the guest's memory:
//
//   started   the record whose write began last
//   synced    the record whose fsync returned last: it and those before it are safe
//
// On the disk of the same instant the last record L fulfils synced <= L <= started.
// An older disk lacks a record that memory counts as safe, a newer one holds a
// record that memory has not begun.
//
// A reader goes over the newest files again and again with O_DIRECT, so that it sees
// the disk and not the page cache, which a restored guest brings along in its memory.
//
// GD_LOGCHECK=1 is the look at a disk from outside: mount it (which replays the file
// system's journal), read everything, say what is there, unmount, power off.
#include "guestd.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

enum { WORDS = PAGE / 8, PER_FILE = 16, FILES = 24 };
#define DIR_NAME "/mnt/log"
#define MAGIC 0x636b6c6f67726563ull

// "ckagent disk log page\0..." as four words.
static const char LOG_MAGIC[32] = "ckagent: numbers of the disk log";

struct numbers {
	char magic[32];
	volatile u64 started, synced;
};

static struct numbers *numbers;
static _Atomic u64 verified, sweeps, bad;

static void fill(u64 *w, u64 seq) {
	u64 base = mix64(seq ^ MAGIC);
	w[0] = MAGIC;
	w[1] = seq;
	for (unsigned i = 2; i < WORDS; i++)
		w[i] = base + i * 0x9e3779b97f4a7c15ull;
}

static bool right(const u64 *w, u64 seq) {
	static _Thread_local u64 want[WORDS];
	fill(want, seq);
	return !memcmp(w, want, sizeof want);
}

static void complain(u64 seq, const char *what) {
	if (atomic_fetch_add(&bad, 1) < 16)
		say("BAD kind=log seq=%llu what=%s started=%llu synced=%llu", (unsigned long long)seq, what,
		    (unsigned long long)numbers->started, (unsigned long long)numbers->synced);
}

static void path_of(char *p, size_t len, u64 file) {
	snprintf(p, len, DIR_NAME "/log-%08llu", (unsigned long long)file);
}

static bool sync_dir(void) {
	int d = open(DIR_NAME, O_RDONLY | O_DIRECTORY);
	bool ok = d >= 0 && !fsync(d);
	if (d >= 0)
		close(d);
	return ok;
}

static void *writer(void *arg) {
	static u64 buf[WORDS];
	u64 rate = *(u64 *)arg, next = mono_ns();
	int fd = -1;
	for (u64 seq = 1;; seq++) {
		numbers->started = seq;
		u64 file = (seq - 1) / PER_FILE, at = (seq - 1) % PER_FILE;
		bool ok = true;
		if (at == 0) {
			char path[64];
			if (fd >= 0)
				close(fd);
			path_of(path, sizeof path, file);
			fd = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0644);
			if (file >= FILES) {
				char old[64];
				path_of(old, sizeof old, file - FILES);
				ok = !unlink(old);
			}
			ok = ok && fd >= 0 && sync_dir();
		}
		fill(buf, seq);
		ok = ok && pwrite(fd, buf, sizeof buf, at * PAGE) == (ssize_t)sizeof buf && !fsync(fd);
		if (!ok) {
			complain(seq, strerror(errno));
			return NULL;
		}
		numbers->synced = seq;
		if (rate) {
			next = next + 1000000000ull / rate > mono_ns() ? next + 1000000000ull / rate : mono_ns();
			sleep_until(next);
		}
	}
}

// Reads a whole file past the page cache; the number of bytes, -1 if it is not there.
static ssize_t read_direct(u64 file, u64 *buf) {
	char path[64];
	path_of(path, sizeof path, file);
	int fd = open(path, O_RDONLY | O_DIRECT);
	if (fd < 0)
		return -1;
	ssize_t n = pread(fd, buf, PER_FILE * PAGE, 0);
	close(fd);
	return n;
}

static u64 *direct_buffer(void) {
	void *p = mmap(NULL, PER_FILE * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (p == MAP_FAILED)
		fatal("log buffer");
	return p;
}

static void *reader(void *arg) {
	(void)arg;
	u64 *buf = direct_buffer();
	for (;;) {
		u64 to = numbers->synced;
		// The oldest file may be removed while it is read.
		u64 last = to / PER_FILE, first = last > FILES - 2 ? last - (FILES - 2) : 0;
		for (u64 file = first; to && file <= last; file++) {
			ssize_t n = read_direct(file, buf);
			if (n < 0 && (numbers->started - 1) / PER_FILE >= file + FILES)
				continue; // it took so long that the file's time is over
			for (u64 at = 0; at < PER_FILE; at++) {
				u64 seq = file * PER_FILE + at + 1;
				if (seq > to)
					break;
				if (n < (ssize_t)((at + 1) * PAGE))
					complain(seq, "missing");
				else if (!right(buf + at * WORDS, seq))
					complain(seq, "content");
				atomic_fetch_add_explicit(&verified, 1, memory_order_relaxed);
			}
			sleep_until(mono_ns() + 2000000);
		}
		if (to)
			atomic_fetch_add(&sweeps, 1);
		sleep_until(mono_ns() + 20000000);
	}
	return NULL;
}

void log_start(void) {
	static u64 rate;
	if (!param("LOG", NULL))
		return;
	rate = param_u64("LOG", 0);
	numbers = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (numbers == MAP_FAILED)
		fatal("log numbers");
	memcpy(numbers->magic, LOG_MAGIC, sizeof numbers->magic);
	if (mkdir(DIR_NAME, 0755) || !sync_dir())
		fatal(DIR_NAME);
	spawn(writer, &rate, "log");
	spawn(reader, NULL, "log reader");
}

void log_report(void) {
	if (numbers)
		say("LOG started=%llu synced=%llu v=%llu sweeps=%llu bad=%llu", (unsigned long long)numbers->started,
		    (unsigned long long)numbers->synced, (unsigned long long)verified, (unsigned long long)sweeps,
		    (unsigned long long)bad);
}

void log_audit(void) {
	if (!param("LOGCHECK", NULL))
		return;
	static u64 files[4 * FILES];
	unsigned n = 0;
	DIR *d = opendir(DIR_NAME);
	for (struct dirent *e; d && (e = readdir(d)) && n < 4 * FILES;)
		if (!strncmp(e->d_name, "log-", 4))
			files[n++] = strtoull(e->d_name + 4, NULL, 10);
	if (d)
		closedir(d);
	for (unsigned i = 1; i < n; i++) // insertion sort: few, and almost in order
		for (unsigned j = i; j && files[j] < files[j - 1]; j--) {
			u64 t = files[j];
			files[j] = files[j - 1], files[j - 1] = t;
		}
	u64 *buf = direct_buffer(), first = 0, last = 0, records = 0, wrong = 0;
	for (unsigned i = 0; i < n; i++) {
		ssize_t got = read_direct(files[i], buf);
		for (u64 at = 0; (ssize_t)((at + 1) * PAGE) <= got; at++) {
			u64 seq = files[i] * PER_FILE + at + 1;
			if (!right(buf + at * WORDS, seq)) {
				wrong++;
				continue;
			}
			records++;
			if (!first)
				first = seq;
			else if (seq != last + 1)
				wrong++; // a hole
			last = seq;
		}
	}
	say("LOGCHECK first=%llu last=%llu records=%llu bad=%llu", (unsigned long long)first, (unsigned long long)last,
	    (unsigned long long)records, (unsigned long long)wrong);
	if (umount("/mnt"))
		say("FATAL umount: %s", strerror(errno));
	tcdrain(1);
	sync();
	reboot(RB_POWER_OFF);
}
