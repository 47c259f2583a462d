package faultserver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// kernelTypes are the kernel's types, which are read while there is nothing to wait for.
type kernelTypes struct {
	cache *btf.Cache
	done  chan struct{}
}

func readTypes(wanted bool) *kernelTypes {
	k := &kernelTypes{cache: btf.NewCache(), done: make(chan struct{})}
	if !wanted {
		close(k.done)
		return k
	}
	go func() { // joined by wait
		defer close(k.done)
		_, _ = k.cache.Kernel() // who needs them asks again, and learns why there are none
	}()
	return k
}

func (k *kernelTypes) wait() { <-k.done }

// awaitConfig gets ready for what is expected, and waits for the configuration and the
// files that come with it; errNotNeeded if none comes.
func awaitConfig(conn *net.UnixConn) (types *kernelTypes, cfg Config, files []*os.File, err error) {
	buf := make([]byte, maxDatagram)
	var e expectation
	if _, err := receiveJSON(conn, buf, &e); err != nil {
		return nil, cfg, nil, fmt.Errorf("fault server: expectation: %w", err)
	}
	expected := readTypes(e.Engine == Kernel)
	defer func() {
		if err != nil {
			expected.wait()
		}
	}()
	files, err = receiveJSON(conn, buf, &cfg)
	switch {
	case errors.Is(err, io.EOF):
		return nil, cfg, nil, errNotNeeded
	case err != nil:
		return nil, cfg, nil, fmt.Errorf("fault server: configuration: %w", err)
	}
	want := keptFile
	if cfg.Kept {
		want = maxFiles
	}
	if len(files) != want {
		return nil, cfg, nil, errors.Join(fmt.Errorf("fault server: configuration with %d files, want %d", len(files), want), closeAll(files))
	}
	return expected, cfg, files, nil
}

// errNotNeeded: whoever launched the process came to need none.
var errNotNeeded = errors.New("fault server: not needed")

// receiveJSON reads one message and the files that come with it; io.EOF if there is
// nobody any more.
func receiveJSON(conn *net.UnixConn, buf []byte, into any) (files []*os.File, err error) {
	oob := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
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
			return nil, errors.Join(err, closeAll(files))
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	if n == 0 {
		return nil, errors.Join(io.EOF, closeAll(files))
	}
	if err := json.Unmarshal(buf[:n], into); err != nil {
		return nil, errors.Join(err, closeAll(files))
	}
	return files, nil
}

func closeAll(files []*os.File) error {
	var errs []error
	for _, f := range files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
