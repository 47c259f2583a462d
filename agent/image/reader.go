package image

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/cespare/xxhash/v2"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// maxChunks bounds the pagemap kept in memory: 4096 chunks are 64 MiB and cover
// 16 GiB of 4 KiB pages. Beyond that the oldest are read again.
const maxChunks = 4096

// Reader gives random access to the pages of one checkpoint. All methods are
// safe for concurrent use.
type Reader struct {
	fs       fsys.FS
	dir      string
	manifest *Manifest
	layout   layout
	pagemap  fsys.ReadFile
	segments []fsys.ReadFile
	sums     []uint64 // per chunk
	zeroSum  []uint64 // per block
	frames   frameCache

	chunks []atomic.Pointer[chunk]
	loaded struct { // the chunks in memory, oldest first, as a ring
		sync.Mutex
		ring []uint64
		next int
	}

	life   sync.RWMutex // read-held by every call; Close takes it
	closed bool
}

// OpenReader opens the checkpoint in a directory of the host. It reads the
// manifest and the head of the pagemap and compares the sizes of all files; it
// reads no page.
func OpenReader(dir string) (*Reader, error) { return OpenReaderFS(fsys.OS{}, dir) }

// OpenReaderFS is OpenReader on another file system.
func OpenReaderFS(f fsys.FS, dir string) (*Reader, error) {
	m, err := ReadManifest(f, dir)
	if err != nil {
		return nil, err
	}
	r := &Reader{fs: f, dir: dir, manifest: m, layout: layoutOf(m.Blocks)}
	if err := r.open(); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// ReadManifest reads and checks the manifest of the checkpoint in a directory.
// problem.NotFound if there is none: the checkpoint was never committed.
func ReadManifest(f fsys.FS, dir string) (*Manifest, error) {
	path := filepath.Join(dir, ManifestName)
	data, err := fsys.ReadFileLimit(f, path, MaxManifestBytes)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, problem.New(problem.NotFound, "read manifest", path, "no checkpoint here: %w", err)
	case errors.Is(err, fsys.ErrTooLarge), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, corrupt("read manifest", path, "%w", err)
	case err != nil:
		return nil, fsys.Problem("read manifest", path, err)
	}
	return DecodeManifest(path, data)
}

func (r *Reader) open() error {
	m := r.manifest
	var err error
	if r.pagemap, err = r.openFile(m.Pagemap.Name, m.Pagemap.Bytes); err != nil {
		return err
	}
	path := r.path(m.Pagemap.Name)
	head := make([]byte, m.Pagemap.HeadBytes)
	if err := readFull("read pagemap", path, r.pagemap, head, 0); err != nil {
		return err
	}
	if got := Sum(head); got != m.Pagemap.HeadChecksum {
		return corrupt("read pagemap", at(path, 0), "checksum of the head is %v: expected %v from the manifest", got, m.Pagemap.HeadChecksum)
	}
	if r.sums, err = decodeHead(path, head, m.Blocks, len(m.Segments)); err != nil {
		return err
	}
	for _, s := range m.Segments {
		f, err := r.openFile(s.Name, s.Bytes)
		if err != nil {
			return err
		}
		r.segments = append(r.segments, f)
	}
	r.chunks = make([]atomic.Pointer[chunk], r.layout.chunks)
	r.loaded.ring = make([]uint64, 0, min(r.layout.chunks, maxChunks))
	r.zeroSum = make([]uint64, len(m.Blocks))
	sums := map[uint64]uint64{}
	for i, b := range m.Blocks {
		if _, ok := sums[b.PageBytes]; !ok {
			sums[b.PageBytes] = xxhash.Sum64(zeroPage[:b.PageBytes])
		}
		r.zeroSum[i] = sums[b.PageBytes]
	}
	return nil
}

func (r *Reader) path(name string) string { return filepath.Join(r.dir, name) }

// openFile opens a named file and compares its size.
func (r *Reader) openFile(name string, bytes uint64) (fsys.ReadFile, error) {
	const op = "open checkpoint"
	path := r.path(name)
	f, err := r.fs.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, corrupt(op, path, "a file of the checkpoint is missing: %w", err)
	}
	if err != nil {
		return nil, fsys.Problem(op, path, err)
	}
	if uint64(f.Size()) != bytes {
		f.Close()
		return nil, corrupt(op, path, "%d bytes: expected %d from the manifest", f.Size(), bytes)
	}
	return f, nil
}

// readFull reads exactly dst; a file that ends earlier was truncated.
func readFull(op, path string, f fsys.ReadFile, dst []byte, off int64) error {
	n, err := f.ReadAt(dst, off)
	if n == len(dst) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return corrupt(op, at(path, off+int64(n)), "the file ends here: expected %d more bytes", len(dst)-n)
	}
	return fsys.Problem(op, at(path, off), err)
}

// Manifest is the checkpoint's manifest. Do not change it.
func (r *Reader) Manifest() *Manifest { return r.manifest }

// Dir is the directory of the checkpoint.
func (r *Reader) Dir() string { return r.dir }

// Close waits for the calls under way and closes the files.
func (r *Reader) Close() error {
	r.life.Lock()
	defer r.life.Unlock()
	if r.closed {
		return nil
	}
	r.closed = true
	var first error
	for _, f := range append([]fsys.ReadFile{r.pagemap}, r.segments...) {
		if f == nil {
			continue
		}
		if err := f.Close(); err != nil && first == nil {
			first = fsys.Problem("close checkpoint", r.dir, err)
		}
	}
	r.frames.close()
	return first
}

func (r *Reader) enter(op string) error {
	r.life.RLock()
	if r.closed {
		r.life.RUnlock()
		return problem.New(problem.Failed, op, r.dir, "%w", ErrClosed)
	}
	return nil
}

// DeviceState is the device state, checked.
func (r *Reader) DeviceState(ctx context.Context) ([]byte, error) {
	const op = "read device state"
	if err := r.enter(op); err != nil {
		return nil, err
	}
	defer r.life.RUnlock()
	if err := ctx.Err(); err != nil {
		return nil, cancelled(op, r.dir, err)
	}
	ref := r.manifest.DeviceState
	f, err := r.openFile(ref.Name, ref.Bytes)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data := make([]byte, ref.Bytes)
	if err := readFull(op, r.path(ref.Name), f, data, 0); err != nil {
		return nil, err
	}
	if got := Sum(data); got != ref.Checksum {
		return nil, corrupt(op, at(r.path(ref.Name), 0), "checksum is %v: expected %v", got, ref.Checksum)
	}
	return data, nil
}

// bounds checks the pages of a call.
func (r *Reader) bounds(op string, block int, first, n uint64) error {
	if block < 0 || block >= len(r.manifest.Blocks) {
		return problem.New(problem.Failed, op, r.dir, "block %d of %d", block, len(r.manifest.Blocks))
	}
	if pages := r.manifest.Blocks[block].Pages(); first > pages || n > pages-first {
		return problem.New(problem.Failed, op, r.pageName(block, first), "%d pages from there: the block has %d", n, pages)
	}
	return nil
}

// ReadPage reads one page into dst, which is one page long, and checks it. zero
// says that it is recorded as zeros (dst is cleared all the same).
func (r *Reader) ReadPage(block int, page uint64, dst []byte) (zero bool, err error) {
	zeros, err := r.ReadRun(block, page, dst)
	return zeros > 0, err
}

// ReadRun reads consecutive pages into dst, which is whole pages long, and checks
// each. Pages that lie side by side are read by one system call. zeros is how
// many of them are recorded as zeros. On an error dst holds nothing usable.
func (r *Reader) ReadRun(block int, first uint64, dst []byte) (zeros uint64, err error) {
	const op = "read page"
	if err := r.enter(op); err != nil {
		return 0, err
	}
	defer r.life.RUnlock()
	if err := r.bounds(op, block, first, 0); err != nil {
		return 0, err
	}
	size := r.manifest.Blocks[block].PageBytes
	n := uint64(len(dst)) / size
	if uint64(len(dst))%size != 0 || n == 0 {
		return 0, problem.New(problem.Failed, op, r.pageName(block, first), "buffer of %d bytes: pages have %d", len(dst), size)
	}
	if err := r.bounds(op, block, first, n); err != nil {
		return 0, err
	}
	for i := uint64(0); i < n; {
		l, sum, err := r.entry(block, first+i)
		if err != nil {
			return 0, err
		}
		switch l.kind() {
		case kindZero:
			clear(dst[i*size : (i+1)*size])
			zeros++
			i++
		case kindFrame:
			if err := r.readFramePage(block, first+i, l, sum, dst[i*size:(i+1)*size]); err != nil {
				return 0, err
			}
			i++
		default:
			k, err := r.readRaw(block, first+i, l, dst[i*size:])
			if err != nil {
				return 0, err
			}
			i += k
		}
	}
	return zeros, nil
}

// readRaw reads the page at l and those after it that follow it in the segment.
func (r *Reader) readRaw(block int, first uint64, l location, dst []byte) (pages uint64, err error) {
	size := r.manifest.Blocks[block].PageBytes
	n := uint64(1)
	for ; n*size < uint64(len(dst)); n++ {
		next, _, err := r.entry(block, first+n)
		if err != nil {
			return 0, err
		}
		if next != l+location(n*size/rawUnit) {
			break
		}
	}
	seg, off := l.segment(), l.rawOffset()
	path := r.path(r.manifest.Segments[seg].Name)
	if err := readFull("read page", path, r.segments[seg], dst[:n*size], int64(off)); err != nil {
		return 0, err
	}
	for i := range n {
		_, sum, err := r.entry(block, first+i)
		if err != nil {
			return 0, err
		}
		if got := xxhash.Sum64(dst[i*size : (i+1)*size]); got != sum {
			return 0, r.pageError(block, first+i, at(path, int64(off+i*size)), got, sum)
		}
	}
	return n, nil
}

func (r *Reader) pageError(block int, page uint64, where string, got, want uint64) error {
	return corrupt("read page", where, "%s: checksum is %016x: expected %016x", r.pageName(block, page), got, want)
}

// readFramePage takes one page out of its frame.
func (r *Reader) readFramePage(block int, page uint64, l location, sum uint64, dst []byte) error {
	off, index := l.frame()
	path := r.path(r.manifest.Segments[l.segment()].Name)
	shift := pageShift(r.manifest.Blocks[block].PageBytes)
	if err := r.frames.page(r, l.segment(), off, shift, index, dst); err != nil {
		return err
	}
	if got := xxhash.Sum64(dst); got != sum {
		return r.pageError(block, page, at(path, int64(off)), got, sum)
	}
	return nil
}

// readFrame reads and bounds the frame at off; buf has room for the largest.
func (r *Reader) readFrame(seg int, off uint64, shift uint, buf []byte) (h frameHeader, payload []byte, err error) {
	const op = "read frame"
	s := r.manifest.Segments[seg]
	path := r.path(s.Name)
	// One read takes the header and, nearly always, the whole payload with it.
	n := min(uint64(len(buf)), s.Bytes-off)
	if err := readFull(op, path, r.segments[seg], buf[:n], int64(off)); err != nil {
		return h, nil, err
	}
	if h, err = parseFrameHeader(buf[:n]); err != nil {
		return h, nil, corrupt(op, at(path, int64(off)), "%w", err)
	}
	if h.shift != shift {
		return h, nil, corrupt(op, at(path, int64(off)), "frame of 2^%d byte pages: the block has 2^%d", h.shift, shift)
	}
	if uint64(h.frameBytes()) > n {
		return h, nil, corrupt(op, at(path, int64(off)), "frame of %d bytes: %d are left in the segment", h.frameBytes(), n)
	}
	payload = buf[frameHeaderBytes : frameHeaderBytes+h.payload]
	if got := xxhash.Sum64(payload); got != h.sum {
		return h, nil, corrupt(op, at(path, int64(off)), "checksum of the frame is %016x: expected %016x", got, h.sum)
	}
	for i, b := range buf[frameHeaderBytes+h.payload : h.frameBytes()] {
		if b != 0 {
			return h, nil, corrupt(op, at(path, int64(off)+int64(frameHeaderBytes+h.payload+i)), "padding byte %#02x: expected 0", b)
		}
	}
	return h, payload, nil
}
