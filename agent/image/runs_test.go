package image

import (
	"bytes"
	"context"
	"math/rand"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/ckagent/ckagent/agent/image/fsys"
)

// countingFS counts the writes to segments.
type countingFS struct {
	fsys.OS
	writes *atomic.Int64
}

type countingFile struct {
	fsys.File
	writes *atomic.Int64
}

func (f countingFS) Create(name string) (fsys.File, error) {
	file, err := f.OS.Create(name)
	return countingFile{file, f.writes}, err
}

func (f countingFile) WriteVec(bufs [][]byte, off int64) error {
	f.writes.Add(1)
	return f.File.WriteVec(bufs, off)
}

// TestWriteRuns: pages of several blocks in any order share a write, whatever the
// codec, across the ends of segments, and none is lost or put in another's place.
func TestWriteRuns(t *testing.T) {
	for _, codec := range codecs() {
		t.Run(codec, func(t *testing.T) {
			dir := t.TempDir()
			fs := countingFS{writes: new(atomic.Int64)}
			key, err := NewTagKey(bytes.Repeat([]byte{1}, TagSecretBytes), "vm:x")
			if err != nil {
				t.Fatal(err)
			}
			blocks := testBlocks()
			w, err := NewWriter(dir, blocks, WriterOptions{FS: fs, Compress: codec, SegmentBytes: 1, Key: key, Dedup: true})
			if err != nil {
				t.Fatal(err)
			}
			var ram [][]byte
			var runs []Run
			for i, b := range blocks {
				data := fillPages(int64(i), b.UsedBytes)
				ram = append(ram, data)
				for first, n := uint64(0), uint64(1); first < b.Pages(); first, n = first+n, 1 {
					if i == 0 && first%16 == 0 { // some are longer
						n = min(5, b.Pages()-first)
					}
					runs = append(runs, Run{i, first, data[first*b.PageBytes : (first+n)*b.PageBytes]})
				}
			}
			rand.New(rand.NewSource(1)).Shuffle(len(runs), func(i, k int) { runs[i], runs[k] = runs[k], runs[i] })
			calls := int64(0)
			for rest := runs; len(rest) > 0; calls++ {
				n := min(60, len(rest))
				if err := w.WriteRuns(rest[:n]); err != nil {
					t.Fatal(err)
				}
				rest = rest[n:]
			}
			// One for what stays as it is, one for what is compressed; a huge page has its
			// own, and the end of a segment makes one more.
			if n := fs.writes.Load(); n > 3*calls+12 {
				t.Errorf("%d writes for %d calls", n, calls)
			}
			state := fillPages(99, 70000)
			if err := w.WriteDeviceState(bytes.NewReader(state)); err != nil {
				t.Fatal(err)
			}
			s, err := w.Finish(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			m, err := EncodeManifest(testManifest(s))
			if err != nil {
				t.Fatal(err)
			}
			if err := fsys.WriteFile(fs, filepath.Join(dir, ManifestName), m); err != nil {
				t.Fatal(err)
			}
			r, err := OpenReader(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			checkImage(t, r, ram, state)
			if err := r.Verify(context.Background(), nil); err != nil {
				t.Error(err)
			}
		})
	}
}
