package disk

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// FileOf is how the programs name an open file or a path; ok is false for what is
// neither a regular file nor a block device.
func FileOf(path string) (f File, ok bool, err error) {
	st, err := os.Stat(path)
	if err != nil {
		return File{}, false, err
	}
	sys, isStat := st.Sys().(*syscall.Stat_t)
	switch {
	case !isStat:
		return File{}, false, nil
	case st.Mode().IsRegular():
		return File{Device: kernelDevice(sys.Dev), Inode: sys.Ino}, true, nil
	case st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0:
		return File{Device: kernelDevice(sys.Rdev)}, true, nil
	}
	return File{}, false, nil
}

// kernelDevice turns a device number of stat(2) into the kernel's own form.
func kernelDevice(dev uint64) uint32 { return unix.Major(dev)<<20 | unix.Minor(dev) }
