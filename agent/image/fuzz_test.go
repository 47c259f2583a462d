package image

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"testing"

	"github.com/cespare/xxhash/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/ckagent/ckagent/agent/image/fsys/memfs"
	"github.com/ckagent/ckagent/agent/problem"
)

// wantDecodeError accepts the errors a decoder may give for hostile input.
func wantDecodeError(t *testing.T, err error) {
	t.Helper()
	if !problem.Is(err, problem.Integrity) && !problem.Is(err, problem.Refused) && !problem.Is(err, problem.NotFound) {
		t.Fatalf("%v (%s)", err, problem.CodeOf(err))
	}
}

// FuzzManifest decodes manifests. With repair set the checksum is made right, so
// that the mutations reach the decoder behind it.
func FuzzManifest(f *testing.F) {
	_, m, _, _ := smallImage(f, "s2")
	m.Hot = HotRuns{{0, 1, 2}}
	data, err := EncodeManifest(m)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data, true)
	f.Add(data, false)
	f.Add(bytes.Replace(data, []byte(`"version": 1`), []byte(`"version": 2`), 1), true)
	f.Add(bytes.Replace(data, []byte(`"minor": 2,`), []byte(`"minor": 3, "new": [1],`), 1), true)
	f.Add([]byte("{\n  \"checksum\": \"xxh64:0000000000000000\"\n}\n"), true)
	f.Fuzz(func(t *testing.T, data []byte, repair bool) {
		if repair && len(data) >= trailerBytes {
			data = bytes.Clone(data)
			seal(data)
		}
		m, err := DecodeManifest("fuzz", data)
		if err != nil {
			wantDecodeError(t, err)
			return
		}
		again, err := EncodeManifest(m)
		if err != nil {
			return // valid to read (a later minor version), not to write
		}
		m2, err := DecodeManifest("again", again)
		if err != nil {
			t.Fatal(err)
		}
		a, _ := json.Marshal(m)
		b, _ := json.Marshal(m2)
		if m.CreatedAt.Equal(m2.CreatedAt) && m.Requires != nil && m.Segments != nil && m.Machine.Argv != nil &&
			m.CreatedAt.Location() == m2.CreatedAt.Location() && !bytes.Equal(a, b) {
			t.Fatal(cmp.Diff(string(a), string(b)))
		}
	})
}

// FuzzPagemap reads every page of an image whose pagemap was tampered with, all
// of its checksums made right again.
func FuzzPagemap(f *testing.F) {
	for _, codec := range []string{"none", "s2", "zstd"} {
		fs, m, _, _ := smallImage(f, codec)
		fs.Update("/"+m.Pagemap.Name, func(b []byte) []byte {
			f.Add(b[m.Pagemap.HeadBytes:], b[:128], codec == "none")
			return b
		})
	}
	type img struct {
		fs      *memfs.FS
		m       *Manifest
		pagemap []byte
	}
	imgs := map[bool]img{}
	for raw, codec := range map[bool]string{true: "none", false: "zstd"} {
		fs, m, _, _ := smallImage(f, codec)
		i := img{fs: fs, m: m}
		fs.Update("/"+m.Pagemap.Name, func(b []byte) []byte { i.pagemap = bytes.Clone(b); return b })
		imgs[raw] = i
	}
	f.Fuzz(func(t *testing.T, entries, head []byte, raw bool) {
		fs, m := imgs[raw].fs, *imgs[raw].m
		fs.Update("/"+m.Pagemap.Name, func([]byte) []byte {
			b := bytes.Clone(imgs[raw].pagemap) // no trace of the run before
			copy(b[m.Pagemap.HeadBytes:], entries)
			copy(b, head[:min(len(head), headerBytes+recordBytes)])
			table := chunkTable(len(m.Blocks))
			binary.LittleEndian.PutUint64(b[table:], xxhash.Sum64(b[m.Pagemap.HeadBytes:]))
			m.Pagemap.HeadChecksum = Sum(b[:m.Pagemap.HeadBytes])
			return b
		})
		putManifest(t, fs, &m)
		readTampered(t, fs)
	})
}

// FuzzSegment reads an image whose segment was tampered with. The checksums of
// frame headers and payloads are made right; those of the pages are not, so no
// page may come out changed.
func FuzzSegment(f *testing.F) {
	type img struct {
		fs    *memfs.FS
		m     *Manifest
		ram   []byte
		state []byte
		seg   string
	}
	var imgs []img
	for _, codec := range []string{"s2", "zstd"} {
		fs, m, ram, state := smallImage(f, codec)
		for _, s := range m.Segments {
			if s.Kind == SegmentFrames {
				imgs = append(imgs, img{fs, m, ram, state, s.Name})
				fs.Update("/"+s.Name, func(b []byte) []byte {
					f.Add(b, len(imgs)%2 == 0)
					return b
				})
			}
		}
	}
	if len(imgs) != 2 {
		f.Fatalf("%d frame segments", len(imgs))
	}
	f.Fuzz(func(t *testing.T, data []byte, zstd bool) {
		i := imgs[0]
		if zstd {
			i = imgs[1]
		}
		i.fs.Update("/"+i.seg, func(b []byte) []byte {
			n := len(b)
			clear(b[copy(b, data):])
			repairFrames(b)
			return b[:n]
		})
		readAll(t, i.fs, i.ram, i.state)
	})
}

// repairFrames makes the checksums of frames right, as far as frames follow each
// other.
func repairFrames(b []byte) {
	for off := 0; off+frameHeaderBytes <= len(b); {
		h := b[off:]
		n := int(binary.LittleEndian.Uint32(h[8:]))
		if n < 0 || n > len(h)-frameHeaderBytes {
			n = 0
		}
		binary.LittleEndian.PutUint64(h[16:], xxhash.Sum64(h[frameHeaderBytes:frameHeaderBytes+n]))
		binary.LittleEndian.PutUint64(h[24:], xxhash.Sum64(h[:24]))
		off += alignFrame(frameHeaderBytes + n)
	}
}

// FuzzFrame decodes a frame by itself: header repaired, payload free.
func FuzzFrame(f *testing.F) {
	for _, c := range []codec{codecS2, codecZstd} {
		k, err := newCompressor(c)
		if err != nil {
			f.Fatal(err)
		}
		page := bytes.Repeat([]byte("ckagent "), 512)
		f.Add(bytes.Clone(k.frame(bytes.Repeat(page, 3), 12)))
		k.close()
	}
	dec, err := newZstdDecoder()
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(dec.Close)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < frameHeaderBytes {
			return
		}
		b = bytes.Clone(b)
		binary.LittleEndian.PutUint32(b, frameMagic)
		repairFrames(b)
		h, err := parseFrameHeader(b)
		if err != nil || h.payload > len(b)-frameHeaderBytes {
			return
		}
		if h.contentBytes() > maxFrameContent {
			t.Fatalf("content of %d bytes", h.contentBytes())
		}
		dst := make([]byte, h.contentBytes())
		_ = decompress(dec, h.codec, dst, b[frameHeaderBytes:frameHeaderBytes+h.payload])
	})
}

// FuzzImage tampers with the manifest's numbers and the pagemap together, all
// checksums right, so that sizes that do not fit each other reach the reader.
func FuzzImage(f *testing.F) {
	f.Add(uint64(40*4096), uint64(4096), uint64(0), uint64(0), []byte{})
	f.Add(uint64(1<<40), uint64(2<<20), uint64(1<<44), uint64(1), []byte{0xff})
	fs, m0, _, _ := smallImage(f, "zstd")
	f.Fuzz(func(t *testing.T, used, page, segBytes, kind uint64, entries []byte) {
		m := *m0
		m.Blocks = []Block{{Name: "r", UsedBytes: used, TotalBytes: used, PageBytes: page}}
		m.Segments = append([]Segment(nil), m0.Segments...)
		if segBytes != 0 {
			m.Segments[0].Bytes = segBytes
		}
		m.Segments[0].Kind = []SegmentKind{SegmentFrames, SegmentRaw, "other"}[kind%3]
		if ValidateBlocks(m.Blocks) != nil || used > 64<<20 {
			return
		}
		l := layoutOf(m.Blocks)
		all := make([]byte, l.entries*entryBytes)
		copy(all, entries)
		var sums []uint64
		for off := 0; off < len(all); off += chunkBytes {
			sums = append(sums, xxhash.Sum64(all[off:min(off+chunkBytes, len(all))]))
		}
		head := encodeHead(m.Blocks, l, len(m.Segments), sums)
		fs.Update("/"+m.Pagemap.Name, func([]byte) []byte { return append(head, all...) })
		m.Pagemap = PagemapRef{Name: m.Pagemap.Name, Bytes: l.fileBytes(), HeadBytes: l.headBytes, HeadChecksum: Sum(head)}
		m.Stats = Stats{RAMBytes: used, Pages: l.entries, StoredBytes: m.DeviceState.Bytes + m.Pagemap.Bytes}
		for _, s := range m.Segments {
			m.Stats.StoredBytes += s.Bytes
		}
		data, err := EncodeManifest(&m)
		if err != nil {
			return
		}
		fs.Update("/"+ManifestName, func([]byte) []byte { return data })
		readTampered(t, fs)
	})
}

// readTampered reads what can be read; what is read matches its checksum.
func readTampered(t *testing.T, fs *memfs.FS) {
	t.Helper()
	r, err := OpenReaderFS(fs, "/")
	if err != nil {
		wantDecodeError(t, err)
		return
	}
	defer r.Close()
	size := r.Manifest().Blocks[0].PageBytes
	page := make([]byte, size)
	for p := range min(r.Manifest().Blocks[0].Pages(), 2000) {
		if _, err := r.ReadPage(0, p, page); err != nil {
			wantDecodeError(t, err)
			continue
		}
		if want, err := r.PageChecksum(0, p); err != nil || want != Sum(page) {
			t.Fatalf("page %d: %v, %v", p, want, err)
		}
	}
	if err := r.Verify(context.Background(), nil); err != nil {
		wantDecodeError(t, err)
	}
}
