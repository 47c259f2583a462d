package qmp

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/procstat"
)

const maxProcBytes = 8 << 20 // a command line may take up to 6 MiB

type answer int

const (
	unknown answer = iota
	no
	yes
)

// peerProcess is the process at the other end, held by its directory in /proc,
// which never becomes that of another process of the same number.
type peerProcess struct{ dir *os.File }

func watchPeer(e Endpoint) peerProcess {
	if e.PID <= 0 {
		return peerProcess{}
	}
	dir, err := os.Open(procPath(e.PID))
	if err != nil {
		return peerProcess{} // gone already: the connection will say so
	}
	return peerProcess{dir}
}

// exited asks without waiting: a process closes its sockets well before it
// turns into a zombie, but is marked as exiting by then.
func (p peerProcess) exited() answer {
	if p.dir == nil {
		return unknown
	}
	rc, err := p.dir.SyscallConn()
	if err != nil {
		return unknown
	}
	result := unknown
	_ = rc.Control(func(dir uintptr) {
		fd, err := unix.Openat(int(dir), "stat", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			result = yes
			return
		}
		defer unix.Close(fd)
		buf := make([]byte, 4096)
		n, err := unix.Read(fd, buf)
		if err != nil {
			result = yes
			return
		}
		st, err := procstat.Parse(buf[:n])
		switch {
		case err != nil:
		case st.Exiting():
			result = yes
		default:
			result = no
		}
	})
	return result
}

func (p peerProcess) close() {
	if p.dir != nil {
		_ = p.dir.Close()
	}
}

func procPath(pid int, elem ...string) string {
	return filepath.Join(append([]string{"/proc", strconv.Itoa(pid)}, elem...)...)
}

func readProc(pid int, elem ...string) ([]byte, error) {
	f, err := os.Open(procPath(pid, elem...))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// In few large reads: tables of sockets may skip a line at the seams.
	var b bytes.Buffer
	b.Grow(64 << 10)
	if _, err := b.ReadFrom(io.LimitReader(f, maxProcBytes+1)); err != nil {
		return nil, err
	}
	if b.Len() > maxProcBytes {
		return nil, fmt.Errorf("%s is larger than %d bytes", f.Name(), maxProcBytes)
	}
	return b.Bytes(), nil
}

// sockets maps the socket inodes a process holds to one of their descriptors.
func sockets(pid int) (map[uint64]int, error) {
	dir := procPath(pid, "fd")
	names, err := readNames(dir)
	if err != nil {
		return nil, err
	}
	held := make(map[uint64]int)
	for _, name := range names {
		fd, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if ino, ok := socketInode(filepath.Join(dir, name)); ok {
			if old, dup := held[ino]; !dup || fd < old {
				held[ino] = fd
			}
		}
	}
	return held, nil
}

func readNames(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

// socketInode reads a link such as /proc/PID/fd/7 that says "socket:[4711]".
func socketInode(link string) (uint64, bool) {
	text, err := os.Readlink(link)
	if err != nil {
		return 0, false
	}
	text, ok := strings.CutPrefix(text, "socket:[")
	if !ok {
		return 0, false
	}
	ino, err := strconv.ParseUint(strings.TrimSuffix(text, "]"), 10, 64)
	return ino, err == nil
}

// ownerOf finds a process that holds the socket, other than this one.
func ownerOf(inode uint64) (pid int, comm string, ok bool) {
	names, err := readNames("/proc")
	if err != nil {
		return 0, "", false
	}
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		held, err := sockets(pid)
		if err != nil {
			continue // not ours to look into, or gone
		}
		if _, ok := held[inode]; ok {
			st, err := procstat.Read(pid)
			if err != nil {
				continue
			}
			return pid, st.Comm, true
		}
	}
	return 0, "", false
}
