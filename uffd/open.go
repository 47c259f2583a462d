package uffd

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// DevicePath is the device whose open descriptor makes userfaultfds without any
// capability or sysctl (Linux 6.1).
const DevicePath = "/dev/userfaultfd"

// NewFromDevice makes a userfaultfd for this process from an open DevicePath.
// flags: O_CLOEXEC, O_NONBLOCK, FlagUserModeOnly.
func NewFromDevice(dev *os.File, flags int) (*os.File, error) {
	conn, err := dev.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", DevicePath, err)
	}
	var fd uintptr
	var errno unix.Errno
	if err := conn.Control(func(d uintptr) {
		fd, _, errno = unix.Syscall(unix.SYS_IOCTL, d, ioctlNew, uintptr(flags))
	}); err != nil {
		return nil, fmt.Errorf("%s: %w", DevicePath, err)
	}
	if errno != 0 {
		return nil, opError("new", 0, 0, errno)
	}
	return os.NewFile(fd, "userfaultfd"), nil
}

// NewFromSyscall makes a userfaultfd for this process by userfaultfd(2).
func NewFromSyscall(flags int) (*os.File, error) {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, uintptr(flags), 0, 0)
	if errno != 0 {
		e := opError("create", 0, 0, errno).(*OpError)
		if errno == unix.EPERM {
			e.Detail = "faults from kernel mode need CAP_SYS_PTRACE, vm.unprivileged_userfaultfd=1 or " + DevicePath
		}
		return nil, e
	}
	return os.NewFile(fd, "userfaultfd"), nil
}

// New makes a userfaultfd for this process: by DevicePath if it can be opened,
// else by the system call.
func New(flags int) (*os.File, error) {
	dev, devErr := os.OpenFile(DevicePath, os.O_RDWR|unix.O_CLOEXEC, 0)
	if devErr == nil {
		defer dev.Close()
		var f *os.File
		if f, devErr = NewFromDevice(dev, flags); devErr == nil {
			return f, nil
		}
	}
	f, err := NewFromSyscall(flags)
	if err != nil {
		return nil, errors.Join(err, devErr)
	}
	return f, nil
}

// Probe asks the running kernel for everything it offers, by a handshake on a
// descriptor of its own.
func Probe() (Features, error) {
	f, err := New(unix.O_CLOEXEC | unix.O_NONBLOCK)
	if err != nil {
		// Without any right a descriptor for user-mode faults can still be had,
		// and its handshake tells the same.
		var userErr error
		if f, userErr = NewFromSyscall(unix.O_CLOEXEC | unix.O_NONBLOCK | FlagUserModeOnly); userErr != nil {
			return 0, err
		}
	}
	h, err := takeOver(f)
	if err != nil {
		return 0, err
	}
	defer h.Close()
	a := apiArg{api: apiVersion}
	if errno := h.api(&a); errno != 0 {
		return 0, opError("api", 0, 0, errno)
	}
	return Features(a.features), nil
}
