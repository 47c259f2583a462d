package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Header is what the first bytes of a qcow2 image say (docs/interop/qcow2.txt of
// QEMU).
type Header struct {
	SizeBytes uint64 // that a guest sees
	Backing   string // name of the backing file as it is written there, empty if none
}

const (
	magic       = 0x514649fb
	headerBytes = 72   // of version 2, with which version 3 begins
	maxBacking  = 1023 // by the format
)

// ErrFormat says that a file is no qcow2 image.
var ErrFormat = errors.New("not a qcow2 image")

// ReadHeader reads the header of an image, whoever uses it.
func ReadHeader(path string) (Header, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return Header{}, err
	}
	defer f.Close()
	h, err := parseHeader(f)
	if err != nil {
		return h, fmt.Errorf("%s: %w", path, err)
	}
	return h, nil
}

func parseHeader(r io.ReaderAt) (Header, error) {
	var b [headerBytes]byte
	if _, err := r.ReadAt(b[:], 0); err != nil {
		if errors.Is(err, io.EOF) {
			return Header{}, ErrFormat
		}
		return Header{}, err
	}
	if binary.BigEndian.Uint32(b[:]) != magic {
		return Header{}, ErrFormat
	}
	if v := binary.BigEndian.Uint32(b[4:]); v != 2 && v != 3 {
		return Header{}, fmt.Errorf("qcow2 version %d", v)
	}
	h := Header{SizeBytes: binary.BigEndian.Uint64(b[24:])}
	off, n := binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint32(b[16:])
	if off == 0 || n == 0 {
		return h, nil
	}
	if n > maxBacking || off > 1<<21 { // within the first cluster, which has 2 MiB at most
		return Header{}, fmt.Errorf("a backing file name of %d bytes at %d: %w", n, off, ErrFormat)
	}
	name := make([]byte, n)
	if _, err := r.ReadAt(name, int64(off)); err != nil {
		return Header{}, fmt.Errorf("backing file name: %w", err)
	}
	h.Backing = string(name)
	return h, nil
}
