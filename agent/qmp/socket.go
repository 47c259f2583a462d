package qmp

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

func rawOf(conn net.Conn) (syscall.RawConn, error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return nil, fmt.Errorf("%T has no descriptor: %w", conn, errors.ErrUnsupported)
	}
	return sc.SyscallConn()
}

// dupConn duplicates the socket without touching its flags: net's own File
// would switch both to blocking mode on some releases.
func dupConn(conn net.Conn) (*os.File, error) {
	rc, err := rawOf(conn)
	if err != nil {
		return nil, err
	}
	fd := -1
	var dupErr error
	if err := rc.Control(func(s uintptr) {
		fd, dupErr = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 3)
	}); err != nil {
		return nil, fmt.Errorf("duplicate QMP socket: %w", err)
	}
	if dupErr != nil {
		return nil, fmt.Errorf("duplicate QMP socket: %w", dupErr)
	}
	return os.NewFile(uintptr(fd), "qmp"), nil
}

// sendFile writes data with the file's descriptor attached to its first byte.
// It does not use Fd(), which may switch a pipe shared with others to blocking.
func sendFile(uc *net.UnixConn, data []byte, f *os.File) (n int, err error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := rc.Control(func(fd uintptr) {
		n, _, err = uc.WriteMsgUnix(data, unix.UnixRights(int(fd)), nil)
	})
	if cerr != nil {
		return 0, cerr
	}
	return n, err
}

// inodeOf is the socket inode of a connection, which /proc/net and sock_diag
// speak of.
func inodeOf(conn net.Conn) (uint64, error) {
	rc, err := rawOf(conn)
	if err != nil {
		return 0, err
	}
	var st unix.Stat_t
	var statErr error
	if err := rc.Control(func(fd uintptr) { statErr = unix.Fstat(int(fd), &st) }); err != nil {
		return 0, err
	}
	return st.Ino, statErr
}
