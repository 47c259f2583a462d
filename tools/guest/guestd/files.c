// The file writer: files whose content follows from their number alone, written,
// fsynced and renamed into place in order, in a ring, and read back before each
// is replaced. GD_FILES=tmpfs writes below /tmp; GD_FILES=disk on the disk that
// GD_DISK mounts (disk.c).
// What an earlier boot left behind is verified first.
#include "guestd.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILE_WORDS = 8192, RING = 64 }; // 64 KiB each
static _Atomic u64 wrote, checked, bad;
static char dir[64];

static void fill(u64 *buf, u64 n) {
	u64 base = mix64(n + 1);
	buf[0] = n;
	for (unsigned i = 1; i < FILE_WORDS; i++)
		buf[i] = base + i * 0x9e3779b97f4a7c15ull;
}

static void path_of(char *p, size_t len, u64 n, const char *suffix) {
	snprintf(p, len, "%s/ring-%02llu%s", dir, (unsigned long long)(n % RING), suffix);
}

static void complain(const char *path, const char *what) {
	if (bad++ < 16)
		say("BAD kind=file path=%s what=%s", path, what);
}

// verify reads one slot and returns the number of the file in it, or ~0 when
// the slot is empty. want==~0 accepts any number that belongs in the slot.
static u64 verify(u64 slot, u64 want) {
	static u64 have[FILE_WORDS], expect[FILE_WORDS];
	char path[128];
	path_of(path, sizeof path, slot, "");
	int fd = open(path, O_RDONLY);
	if (fd < 0) {
		if (want != ~0ull)
			complain(path, "missing");
		return ~0ull;
	}
	size_t got = 0;
	for (ssize_t k; got < sizeof have && (k = read(fd, (char *)have + got, sizeof have - got)) > 0;)
		got += k;
	close(fd);
	checked++;
	u64 n = have[0];
	if (got != sizeof have)
		complain(path, "short");
	else if (n % RING != slot % RING || (want != ~0ull && n != want))
		complain(path, "number");
	else {
		fill(expect, n);
		if (memcmp(have, expect, sizeof have))
			complain(path, "content");
	}
	return n;
}

static void *work(void *arg) {
	(void)arg;
	static u64 buf[FILE_WORDS];
	u64 every = param_u64("FILES_MS", 50) * 1000000ull, next = 0;
	for (u64 slot = 0; slot < RING; slot++) {
		u64 n = verify(slot, ~0ull);
		if (n != ~0ull && n >= next)
			next = n + 1;
	}
	u64 first = next;
	say("FILES ready dir=%s next=%llu checked=%llu bad=%llu", dir, (unsigned long long)next,
	    (unsigned long long)checked, (unsigned long long)bad);
	for (u64 n = next;; n++) {
		while (ga_frozen)
			sleep_until(mono_ns() + 5 * 1000000ull);
		if (n >= first + RING)
			verify(n, n - RING);
		char tmp[128], path[128];
		path_of(tmp, sizeof tmp, n, ".new");
		path_of(path, sizeof path, n, "");
		fill(buf, n);
		int fd = open(tmp, O_CREAT | O_TRUNC | O_WRONLY, 0644);
		bool ok = fd >= 0;
		for (size_t off = 0; ok && off < sizeof buf;) {
			ssize_t k = write(fd, (char *)buf + off, sizeof buf - off);
			ok = k > 0;
			off += ok ? k : 0;
		}
		ok = ok && !fsync(fd);
		if (fd >= 0)
			close(fd);
		ok = ok && !rename(tmp, path);
		if (!ok)
			complain(path, strerror(errno));
		wrote++;
		sleep_until(mono_ns() + every);
	}
	return NULL;
}

void files_start(void) {
	const char *where = param("FILES", NULL);
	if (!where)
		return;
	if (!strcmp(where, "disk"))
		strcpy(dir, "/mnt/files");
	else {
		mount("tmp", "/tmp", "tmpfs", 0, NULL);
		strcpy(dir, "/tmp/files");
	}
	mkdir(dir, 0755);
	spawn(work, NULL, "files");
}

void files_report(void) {
	if (dir[0])
		say("FILES wrote=%llu checked=%llu bad=%llu", (unsigned long long)wrote, (unsigned long long)checked,
		    (unsigned long long)bad);
}
