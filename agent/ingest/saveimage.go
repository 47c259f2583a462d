package ingest

import (
	"bufio"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/ckagent/ckagent/agent/vm/ramstream"
)

// The head of a libvirt save image (struct virQEMUSaveHeader of libvirt's QEMU
// driver): 16 bytes of magic, then numbers in the byte order of the host that wrote
// it: version, bytes of data, was running, format, offset of the cookie; 14 unused.
const (
	saveMagic     = "LibvirtQemudSave"
	savePartial   = "LibvirtQemudPart"
	saveHeadBytes = 16 + 5*4 + 14*4
	saveVersion   = 2
	maxSaveData   = 16 << 20
)

// Formats of what follows the data.
const (
	saveRaw  = 0
	saveGzip = 1
	saveZstd = 5
)

var saveFormats = []string{"raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse"}

var errSaveImage = errors.New("not a libvirt save image")

// saveImage is what one says beside the stream.
type saveImage struct {
	xml     string
	running bool
}

// openSaveImage looks whether r begins a libvirt save image. It returns the
// migration stream in it, or r as it was.
func openSaveImage(r io.Reader) (io.ReadCloser, *saveImage, error) {
	b := bufio.NewReaderSize(r, 1<<20)
	magic, err := b.Peek(len(saveMagic))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	if string(magic) == savePartial {
		return nil, nil, fmt.Errorf("%w: libvirt did not finish writing it", errSaveImage)
	}
	if string(magic) != saveMagic {
		return io.NopCloser(b), nil, nil
	}
	head := make([]byte, saveHeadBytes)
	if _, err := io.ReadFull(b, head); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errSaveImage, err)
	}
	var order binary.ByteOrder = binary.LittleEndian
	num := func(i int) uint32 { return order.Uint32(head[len(saveMagic)+4*i:]) }
	if num(0) > saveVersion {
		order = binary.BigEndian
	}
	version, dataBytes, running, format, cookie := num(0), num(1), num(2), num(3), num(4)
	if version == 0 || version > saveVersion || dataBytes == 0 || dataBytes > maxSaveData || cookie > dataBytes {
		return nil, nil, fmt.Errorf("%w: version %d, %d bytes of XML, cookie at %d", errSaveImage, version, dataBytes, cookie)
	}
	data := make([]byte, dataBytes)
	if _, err := io.ReadFull(b, data); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errSaveImage, err)
	}
	if cookie > 0 {
		data = data[:cookie]
	}
	for i, c := range data {
		if c == 0 {
			data = data[:i]
			break
		}
	}
	s := &saveImage{xml: string(data), running: running != 0}
	switch format {
	case saveRaw:
		return io.NopCloser(b), s, nil
	case saveGzip:
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", errSaveImage, err)
		}
		return unpacked{z}, s, nil
	case saveZstd:
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(256<<20))
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", errSaveImage, err)
		}
		return unpacked{z.IOReadCloser()}, s, nil
	}
	name := fmt.Sprint(format)
	if int(format) < len(saveFormats) {
		name = saveFormats[format]
	}
	return nil, nil, fmt.Errorf("%w: it was written with libvirt's format %s; save again with format raw, gzip or zstd (save_image_format in qemu.conf)", ramstream.ErrUnsupported, name)
}

// unpacked is a stream that was compressed: what cannot be unpacked is damage.
type unpacked struct{ io.ReadCloser }

func (u unpacked) Read(p []byte) (int, error) {
	n, err := u.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: unpack: %w", errSaveImage, err)
	}
	return n, err
}
