package guest

import (
	"context"
	"os"
	"path/filepath"
)

// InitramfsFile is a member of an initramfs. Mode is st_mode; without a kind it
// is a plain file. The data of a symbolic link is its target; Major and Minor
// are a device node's.
type InitramfsFile struct {
	Name         string // relative to the root
	Mode         uint32
	Data         []byte
	Major, Minor uint32
}

// Initramfs is an archive of the files for QEMU's -initrd. Directories come
// before what is in them.
func Initramfs(files []InitramfsFile) []byte {
	members := make([]file, 0, len(files))
	for _, f := range files {
		members = append(members, file{name: f.Name, mode: f.Mode, data: f.Data, major: f.Major, minor: f.Minor})
	}
	return cpio(members)
}

// Kernel is what the Linux guest is made of, for a guest of somebody else's
// making: the kernel of this Debian release and a static busybox.
type Kernel struct {
	Vmlinux string // for QEMU's -kernel
	Busybox string
}

// LinuxKernel returns the kernel, unpacked if it is not there yet.
func LinuxKernel(ctx context.Context) (Kernel, error) {
	dir, err := linuxKernel(ctx)
	if err != nil {
		return Kernel{}, err
	}
	k := Kernel{Vmlinux: filepath.Join(dir, "vmlinux"), Busybox: filepath.Join(dir, "busybox")}
	for _, path := range []string{k.Vmlinux, k.Busybox} {
		if _, err := os.Stat(path); err != nil {
			return Kernel{}, err
		}
	}
	return k, nil
}
