package passfd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// MaxBytes is how long a message may be. The kernel's own limit is lower where
	// net.core.wmem_max was not raised.
	MaxBytes = 1 << 20
	maxFiles = 8
)

// patience bounds what is said before anything is answered: a process that does not read
// has room for it, unless it was told too much.
const patience = 5 * time.Second

// Pair makes a connection of our end and the one that a child inherits. The child's is to be
// closed here once it has been started, or its death would not be seen.
func Pair(name string) (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: socketpair: %w", name, err)
	}
	theirs = os.NewFile(uintptr(fds[1]), name)
	if ours, err = connOf(os.NewFile(uintptr(fds[0]), name)); err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return ours, theirs, nil
}

// Inherited is the end that this process was started with, as a descriptor that no child of
// its own gets.
func Inherited(fd uintptr, name string) (*net.UnixConn, error) {
	unix.CloseOnExec(int(fd))
	return connOf(os.NewFile(fd, name))
}

// connOf closes f.
func connOf(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("%s: it is a %T", f.Name(), c), c.Close())
	}
	return u, nil
}

// Send sends a message, with files that the peer then has as well.
func Send(c *net.UnixConn, message any, files ...*os.File) error {
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if len(b) > MaxBytes || len(files) > maxFiles {
		return fmt.Errorf("message of %d bytes with %d files: %w", len(b), len(files), unix.EMSGSIZE)
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			conn, err := f.SyscallConn()
			if err != nil {
				return err
			}
			if err := conn.Control(func(fd uintptr) { fds[i] = int(fd) }); err != nil {
				return err
			}
		}
		rights = unix.UnixRights(fds...)
	}
	if err := c.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, _, err := c.WriteMsgUnix(b, rights, nil); err != nil {
		return err
	}
	return c.SetWriteDeadline(time.Time{})
}

// Receive waits for a message and the files that come with it, which are then ours; io.EOF
// if there is nobody any more who could send one. buf is what may be written to meanwhile,
// of MaxBytes.
func Receive(c *net.UnixConn, buf []byte, into any) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			files, err = nil, errors.Join(err, Close(files))
		}
	}()
	oob := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	switch {
	case n == 0:
		return files, io.EOF
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		return files, fmt.Errorf("message of more than %d bytes or %d files: %w", len(buf), maxFiles, unix.EMSGSIZE)
	}
	return files, json.Unmarshal(buf[:n], into)
}

// Close closes files that were received.
func Close(files []*os.File) error {
	var errs []error
	for _, f := range files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
