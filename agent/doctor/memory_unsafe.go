package doctor

import (
	"fmt"
	"os"
	"unsafe"

	"github.com/ckagent/ckagent/uffd"
	"golang.org/x/sys/unix"
)

// alignSkip is how far into b the next address divisible by align lies.
func alignSkip(b []byte, align uintptr) int {
	return int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (align - 1))
}

func gatherUffd() UffdFacts {
	u := UffdFacts{Unprivileged: readInt("/proc/sys/vm/unprivileged_userfaultfd", -1)}
	const flags = unix.O_CLOEXEC | unix.O_NONBLOCK
	dev, err := os.OpenFile(uffd.DevicePath, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		var f *os.File
		if f, err = uffd.NewFromDevice(dev, flags); err == nil {
			f.Close()
		}
		dev.Close()
	}
	u.DeviceErr = err
	f, err := uffd.NewFromSyscall(flags)
	if err == nil {
		f.Close()
	}
	u.SyscallErr = err
	u.Features, u.FeaturesErr = uffd.Probe()

	anon, shared := u.Features&uffd.FeaturePagefaultFlagWP, u.Features&(uffd.FeaturePagefaultFlagWP|uffd.FeatureWPHugetlbfsShmem)
	u.WPAnonErr = tryRegister(anon, uffd.ModeWP, false)
	u.WPSharedErr = tryRegister(shared, uffd.ModeWP, true)
	u.MissingAnonErr = tryRegister(0, uffd.ModeMissing, false)
	u.MissingSharedErr = tryRegister(u.Features&uffd.FeatureMissingShmem, uffd.ModeMissing, true)
	return u
}

// tryRegister registers a page of memory of our own, and arms it if mode asks
// for that.
func tryRegister(features uffd.Features, mode uffd.Mode, shared bool) error {
	f, err := uffd.New(unix.O_CLOEXEC | unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	h, err := uffd.Adopt(f, features)
	if err != nil {
		return err
	}
	defer h.Close()
	n := os.Getpagesize()
	fd, flags := -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS
	if shared {
		if fd, err = unix.MemfdCreate("ckagent-doctor", unix.MFD_CLOEXEC); err != nil {
			return fmt.Errorf("memfd: %w", err)
		}
		defer unix.Close(fd)
		if err := unix.Ftruncate(fd, int64(n)); err != nil {
			return fmt.Errorf("memfd: %w", err)
		}
		flags = unix.MAP_SHARED
	}
	b, err := unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(b)
	at := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))
	io, err := h.Register(at, uint64(n), mode)
	if err != nil {
		return err
	}
	need := uffd.IoctlCopy
	if mode == uffd.ModeWP {
		need = uffd.IoctlWriteProtect
	}
	if !io.Has(need) {
		return fmt.Errorf("registered, but faults cannot be resolved: %w", uffd.ErrUnsupported)
	}
	if mode == uffd.ModeWP {
		return h.WriteProtect(at, uint64(n))
	}
	return nil
}
