// Kernel modules, loaded by the PCI devices that are there. The list is written
// when the initramfs is built (/mods/list): one line a driver,
//     <vendor>:<device>[,<device>...] <module> [<module>...]
// with the modules in the order in which they have to be loaded. A machine
// without virtio devices loads none and is up a second earlier. File systems have
// lines of their own, "fs:<type>", that are loaded when a disk is mounted, and so has
// what is loaded when it is wanted, "on:<what>".
#include "guestd.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

static u64 read_hex(const char *dir, const char *file) {
	char path[320], text[32] = "";
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", dir, file);
	int fd = open(path, O_RDONLY);
	if (fd < 0)
		return 0;
	ssize_t n = read(fd, text, sizeof text - 1);
	close(fd);
	return n > 0 ? strtoull(text, NULL, 16) : 0;
}

static bool present(const char *ids, const u32 *found, unsigned n) {
	char *end;
	u32 vendor = strtoul(ids, &end, 16);
	while (*end == ':' || *end == ',') {
		u32 device = strtoul(end + 1, &end, 16);
		for (unsigned i = 0; i < n; i++)
			if (found[i] == (vendor << 16 | device))
				return true;
	}
	return false;
}

static void load(const char *name) {
	static char done[64][40];
	static unsigned ndone;
	for (unsigned i = 0; i < ndone; i++)
		if (!strcmp(done[i], name))
			return;
	char path[128];
	snprintf(path, sizeof path, "/mods/%s.ko", name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
		say("FATAL module %s: %s", name, strerror(errno));
	if (fd >= 0)
		close(fd);
	if (ndone < 64)
		snprintf(done[ndone++], sizeof done[0], "%s", name);
}

void load_named(const char *key) {
	FILE *f = fopen("/mods/list", "r");
	char line[512];
	while (f && fgets(line, sizeof line, f)) {
		char *save, *name = strtok_r(line, " \n", &save);
		if (!name || strcmp(name, key))
			continue;
		for (char *m; (m = strtok_r(NULL, " \n", &save));)
			load(m);
	}
	if (f)
		fclose(f);
}

void boot_modules(void) {
	u32 found[128];
	unsigned n = 0;
	DIR *d = opendir("/sys/bus/pci/devices");
	for (struct dirent *e; d && (e = readdir(d)) && n < 128;)
		if (e->d_name[0] != '.')
			found[n++] = read_hex(e->d_name, "vendor") << 16 | read_hex(e->d_name, "device");
	if (d)
		closedir(d);
	FILE *f = fopen("/mods/list", "r");
	char line[512];
	while (f && fgets(line, sizeof line, f)) {
		char *save, *ids = strtok_r(line, " \n", &save);
		if (!ids || !strncmp(ids, "fs:", 3) || !strncmp(ids, "on:", 3) || !present(ids, found, n))
			continue;
		for (char *m; (m = strtok_r(NULL, " \n", &save));)
			load(m);
	}
	if (f)
		fclose(f);
}
