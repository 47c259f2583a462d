package qmp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// connect opens the transport. Nothing has been said yet when it returns.
func connect(ctx context.Context, e Endpoint) (net.Conn, error) {
	switch {
	case e.Network == "tcp":
		return connectTCP(ctx, e)
	case e.Network != "unix":
		return nil, fmt.Errorf("network %q: %w", e.Network, errors.ErrUnsupported)
	case strings.HasPrefix(e.Address, "@"):
		var conn net.Conn
		err := inNetNS(e.PID, func() (err error) {
			conn, err = connectUnix(e.Address)
			return err
		})
		return conn, err
	}
	file, err := openSocketFile(e)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	// By way of the descriptor, since sun_path has room for 107 bytes, and
	// since the file cannot be exchanged behind our back any more.
	return connectUnix(fmt.Sprintf("/proc/self/fd/%d", file.Fd()))
}

// connectUnix waits for at most greetingTimeout: the queue of a monitor holds
// two clients, and those that gave up stay in it until QEMU gets to them.
func connectUnix(addr string) (net.Conn, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	tv := unix.NsecToTimeval(int64(greetingTimeout))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	for {
		// Package unix refuses the 108 bytes of a padded abstract name.
		err = syscall.Connect(fd, &syscall.SockaddrUnix{Name: addr})
		if err != unix.EINTR { // a unix socket is then as it was before
			break
		}
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return connOf(fd)
}

func connOf(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "qmp")
	defer f.Close()
	return net.FileConn(f) // also makes it non-blocking
}

// siocUnixFile opens (O_PATH) the file a unix socket is bound to; it asks for
// CAP_NET_ADMIN. include/uapi/linux/un.h: SIOCPROTOPRIVATE + 0.
const siocUnixFile = 0x89e0

// openSocketFile opens the socket's file without side effects. The listening
// socket itself knows it best: whatever has happened to its path since (chdir
// by -daemonize, -chroot, another mount namespace, unlink), this is the file
// that leads to it. Where that is not permitted the path is looked up as the
// target sees it, and then as we do; who answers is checked in any case.
func openSocketFile(e Endpoint) (*os.File, error) {
	if e.PID <= 0 {
		return openPath(unix.AT_FDCWD, e.Address, 0)
	}
	if e.inode != 0 {
		if f, err := fileOfListener(e.PID, e.inode); err == nil {
			return f, nil
		}
	}
	var first error
	for _, try := range []struct {
		dir     string
		path    string
		resolve uint64
	}{
		{"root", e.Address, unix.RESOLVE_IN_ROOT},
		{"cwd", e.Address, 0},
		{"", e.Address, 0},
	} {
		if filepath.IsAbs(e.Address) == (try.dir == "cwd") {
			continue
		}
		dir := unix.AT_FDCWD
		if try.dir != "" {
			fd, err := unix.Open(procPath(e.PID, try.dir), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				first = errors.Join(first, err)
				continue
			}
			defer unix.Close(fd)
			dir = fd
		} else if !filepath.IsAbs(e.Address) {
			continue // our own directory has nothing to do with it
		}
		f, err := openPath(dir, try.path, try.resolve)
		if err == nil {
			return f, nil
		}
		if first == nil {
			first = err
		}
	}
	return nil, first
}

func openPath(dir int, path string, resolve uint64) (*os.File, error) {
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: resolve})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		_ = unix.Close(fd)
		if err == nil {
			err = unix.ENOTSOCK
		}
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// fileOfListener borrows the listening socket for a moment.
func fileOfListener(pid int, inode uint64) (*os.File, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(pidfd)
	held, err := sockets(pid)
	if err != nil {
		return nil, err
	}
	remote, ok := held[inode]
	if !ok {
		return nil, os.ErrNotExist
	}
	listener, err := unix.PidfdGetfd(pidfd, remote, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(listener)
	var st unix.Stat_t
	if err := unix.Fstat(listener, &st); err != nil || st.Ino != inode {
		return nil, os.ErrNotExist // the number has been reused
	}
	fd, err := unix.IoctlRetInt(listener, siocUnixFile)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "monitor socket"), nil
}

func connectTCP(ctx context.Context, e Endpoint) (net.Conn, error) {
	if e.PID <= 0 || sameNetNS(e.PID) {
		d := net.Dialer{Timeout: greetingTimeout}
		return d.DialContext(ctx, "tcp", e.Address)
	}
	// Names are resolved in our own namespace, with our resolver.
	addr, err := net.ResolveTCPAddr("tcp", e.Address)
	if err != nil {
		return nil, err
	}
	family, sa := sockaddr(addr)
	var conn net.Conn
	err = inNetNS(e.PID, func() error {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		tv := unix.NsecToTimeval(int64(greetingTimeout)) // also bounds connect
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
			_ = unix.Close(fd)
			return err
		}
		if err := unix.Connect(fd, sa); err != nil {
			_ = unix.Close(fd)
			return err
		}
		conn, err = connOf(fd)
		return err
	})
	return conn, err
}

func sockaddr(a *net.TCPAddr) (family int, sa unix.Sockaddr) {
	if ip := a.IP.To4(); ip != nil {
		return unix.AF_INET, &unix.SockaddrInet4{Port: a.Port, Addr: [4]byte(ip)}
	}
	s := &unix.SockaddrInet6{Port: a.Port}
	copy(s.Addr[:], a.IP.To16())
	if zone, err := strconv.ParseUint(a.Zone, 10, 32); err == nil {
		s.ZoneId = uint32(zone)
	}
	return unix.AF_INET6, s
}
