// The disk that GD_DISK=<device> names, mounted at /mnt: a file system of type
// GD_FSTYPE (ext4) which the host has made.
#include "guestd.h"
#include <errno.h>
#include <sys/mount.h>
#include <unistd.h>

void disk_start(void) {
	const char *disk = param("DISK", NULL), *type = param("FSTYPE", "ext4");
	if (!disk)
		return;
	char dev[64], key[32];
	snprintf(dev, sizeof dev, "/dev/%s", disk);
	snprintf(key, sizeof key, "fs:%s", type);
	load_named(key);
	// virtio probes in the background; the node appears within moments.
	for (unsigned i = 0; i < 500 && access(dev, F_OK); i++)
		sleep_until(mono_ns() + 10000000ull);
	if (mount(dev, "/mnt", type, 0, NULL))
		say("FATAL mount %s: %s", dev, strerror(errno));
}
