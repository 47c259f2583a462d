package vm

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pidfdInfo is struct pidfd_info of linux/pidfd.h, in its first version.
type pidfdInfo struct {
	mask     uint64
	cgroup   uint64
	ids      [11]uint32 // pid, tgid, ppid, and four pairs of user and group
	exitCode int32
}

const (
	pidfdGetInfo  = 0xc040ff0b // _IOWR(0xff, 11, struct pidfd_info)
	pidfdInfoExit = 1 << 3
)

// pidfdExit is the wait status of the process behind a pidfd, if it was reaped.
func pidfdExit(f *os.File) (code int32, known bool, err error) {
	info := pidfdInfo{mask: pidfdInfoExit}
	conn, err := f.SyscallConn()
	if err != nil {
		return 0, false, err
	}
	var errno unix.Errno
	if err := conn.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, pidfdGetInfo, uintptr(unsafe.Pointer(&info)))
	}); err != nil {
		return 0, false, err
	}
	switch {
	case errno != 0 && !errors.Is(errno, unix.ESRCH):
		return 0, false, errno
	case errno == 0 && info.mask&pidfdInfoExit != 0:
		return info.exitCode, true, nil
	}
	return 0, false, nil // not reaped yet
}
