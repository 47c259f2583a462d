package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	cryptLUKS     = 2          // crypt_method
	extEncryption = 0x0537be77 // header extension that says where the LUKS header is
	longHeader    = 104        // of version 3
	maxLUKS       = 64 << 20   // bytes of a LUKS header with its key slots; usual are 2 MiB
	luksPayload   = 104        // where a LUKS1 header has the first sector of the data
	sectorBytes   = 512
)

var luksMagic = [6]byte{'L', 'U', 'K', 'S', 0xba, 0xbe}

// ErrNoLUKS says that an image is not encrypted in a way that is known here.
var ErrNoLUKS = errors.New("no LUKS header")

// ReadLUKS reads the LUKS header of an encrypted image, with its key slots: of a qcow2
// image, or of a container of driver luks. Nothing in it is a secret by itself.
func ReadLUKS(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	luks, err := readLUKS(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return luks, nil
}

func readLUKS(f *os.File) ([]byte, error) {
	var b [longHeader + 8]byte
	if _, err := f.ReadAt(b[:], 0); err != nil {
		return nil, err
	}
	var at, n uint64
	switch {
	case [6]byte(b[:6]) == luksMagic:
		n = uint64(binary.BigEndian.Uint32(b[luksPayload:])) * sectorBytes
	case binary.BigEndian.Uint32(b[:]) == magic && binary.BigEndian.Uint32(b[4:]) == 3 && binary.BigEndian.Uint32(b[32:]) == cryptLUKS:
		var err error
		if at, n, err = luksExtension(f, uint64(binary.BigEndian.Uint32(b[100:]))); err != nil {
			return nil, err
		}
	default:
		return nil, ErrNoLUKS
	}
	if n < sectorBytes || n > maxLUKS {
		return nil, fmt.Errorf("a LUKS header of %d bytes: %w", n, ErrNoLUKS)
	}
	luks := make([]byte, n)
	if _, err := f.ReadAt(luks, int64(at)); err != nil {
		return nil, err
	}
	if [6]byte(luks[:6]) != luksMagic {
		return nil, ErrNoLUKS
	}
	return luks, nil
}

// luksExtension finds the extension among those that begin at an offset.
func luksExtension(f *os.File, at uint64) (offset, length uint64, err error) {
	for range 32 { // as many as nobody writes
		var b [24]byte
		if _, err := f.ReadAt(b[:], int64(at)); err != nil {
			return 0, 0, err
		}
		kind, n := binary.BigEndian.Uint32(b[:]), uint64(binary.BigEndian.Uint32(b[4:]))
		if kind == extEncryption && n == 16 {
			return binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:]), nil
		}
		if kind == 0 {
			break
		}
		at += 8 + (n+7)&^7
	}
	return 0, 0, ErrNoLUKS
}

// Encrypt makes an empty image, as qemu-img creates it (version 3, reference counts of
// 16 bits), one that is encrypted with the key of a LUKS header: whoever can open the
// image that the header is of can open this one. No secret is needed for that.
func Encrypt(f *os.File, luks []byte) error {
	var b [longHeader]byte
	if _, err := f.ReadAt(b[:], 0); err != nil {
		return err
	}
	be := binary.BigEndian
	header, bits := uint64(be.Uint32(b[100:])), be.Uint32(b[20:])
	if be.Uint32(b[:]) != magic || be.Uint32(b[4:]) != 3 || be.Uint32(b[32:]) != 0 || be.Uint32(b[96:]) != 4 || bits < 9 || bits > 21 || header < longHeader {
		return fmt.Errorf("%s is no empty image of version 3: %w", f.Name(), ErrFormat)
	}
	cluster := uint64(1) << bits
	st, err := f.Stat()
	if err != nil {
		return err
	}
	first := (uint64(st.Size()) + cluster - 1) / cluster
	count := (uint64(len(luks)) + cluster - 1) / cluster
	var entry [8]byte // the first reference block
	if _, err := f.ReadAt(entry[:], int64(be.Uint64(b[48:]))); err != nil {
		return err
	}
	refs := be.Uint64(entry[:])
	if refs == 0 || first+count > cluster/2 {
		return fmt.Errorf("%s has no reference counts for %d clusters more: %w", f.Name(), count, ErrFormat)
	}
	ones := make([]byte, 2*count)
	for i := range count {
		be.PutUint16(ones[2*i:], 1)
	}
	// The extension comes first; what follows, the name of the backing file included,
	// moves on.
	rest := make([]byte, cluster-header-24)
	if _, err := f.ReadAt(rest, int64(header)); err != nil {
		return err
	}
	var ext [24]byte
	be.PutUint32(ext[:], extEncryption)
	be.PutUint32(ext[4:], 16)
	be.PutUint64(ext[8:], first*cluster)
	be.PutUint64(ext[16:], uint64(len(luks)))
	if at := be.Uint64(b[8:]); at != 0 {
		be.PutUint64(b[8:], at+24)
	}
	be.PutUint32(b[32:], cryptLUKS)
	padded := make([]byte, count*cluster)
	copy(padded, luks)
	for _, w := range []struct {
		data []byte
		at   uint64
	}{{padded, first * cluster}, {ones, refs + 2*first}, {rest, header + 24}, {ext[:], header}, {b[:], 0}} {
		if _, err := f.WriteAt(w.data, int64(w.at)); err != nil {
			return err
		}
	}
	return nil
}
