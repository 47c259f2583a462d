package image

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand"
	"testing"

	"github.com/cespare/xxhash/v2"

	"github.com/ckagent/ckagent/agent/image/fsys/memfs"
)

// FuzzInherit continues an image whose pagemap and tags were tampered with, all of its
// checksums made right again: the child is refused, or reads back as what was given, but
// for pages that the parent's tags lied about.
func FuzzInherit(f *testing.F) {
	base := memfs.New(1 << 30)
	l := newLine(f, base, "vm")
	l.blocks, l.ram = l.blocks[:1], l.ram[:1]
	rnd := rand.New(rand.NewSource(2))
	m := l.take(WriterOptions{})
	var pagemap, tags []byte
	read := func(name string, to *[]byte) {
		if err := base.Update(l.dir(1)+"/"+name, func(b []byte) []byte { *to = bytes.Clone(b); return b }); err != nil {
			f.Fatal(err)
		}
	}
	read(m.Pagemap.Name, &pagemap)
	read(m.Tags.Name, &tags)
	f.Add(pagemap[m.Pagemap.HeadBytes:], tags, 0)
	f.Add(pagemap[m.Pagemap.HeadBytes:], tags[:16], 16)
	f.Add(bytes.Repeat([]byte{0x40, 0, 0, 0, 0, 0, 0, 0x40}, 64), tags, -16)
	fresh := make([]byte, 4096)
	rnd.Read(fresh)
	f.Fuzz(func(t *testing.T, entries, tagData []byte, more int) {
		pm, tg, p := bytes.Clone(pagemap), bytes.Clone(tags), *m
		copy(pm[m.Pagemap.HeadBytes:], entries)
		copy(tg, tagData)
		if more > 0 {
			tg = append(tg, make([]byte, more%4096)...)
		} else {
			tg = tg[:max(len(tg)+more, 0)]
		}
		sums := chunkTable(len(m.Blocks))
		for k := uint64(0); k*chunkBytes < uint64(len(pm))-m.Pagemap.HeadBytes; k++ {
			e := pm[m.Pagemap.HeadBytes+k*chunkBytes:]
			binary.LittleEndian.PutUint64(pm[sums+8*k:], xxhash.Sum64(e[:min(len(e), chunkBytes)]))
		}
		p.Pagemap.HeadChecksum = Sum(pm[:m.Pagemap.HeadBytes])
		ref := *m.Tags
		ref.Bytes, ref.Checksum = uint64(len(tg)), Sum(tg)
		p.Tags = &ref
		p.Stats.StoredBytes += ref.Bytes - m.Tags.Bytes
		p.Stats.ZeroPages = p.Stats.Pages - ref.Bytes/TagBytes
		fs := memfs.New(1 << 30)
		for _, d := range []string{"/p", "/c"} {
			if err := fs.Mkdir(d); err != nil {
				t.Fatal(err)
			}
		}
		data, err := EncodeManifest(&p)
		if err != nil {
			return
		}
		files := map[string][]byte{m.Pagemap.Name: pm, m.Tags.Name: tg, ManifestName: data}
		for _, name := range []string{m.DeviceState.Name, m.Segments[0].Name} {
			read(name, &data)
			files[name] = data
		}
		for name, b := range files {
			w, err := fs.Create("/p/" + name)
			if err == nil {
				err = w.WriteVec([][]byte{b}, 0)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		r, err := OpenReaderFS(fs, "/p")
		if err != nil {
			wantDecodeError(t, err)
			return
		}
		defer r.Close()
		w, err := NewWriter("/c", l.blocks, WriterOptions{FS: fs, Key: l.key, Parent: r, Dedup: true, VM: "vm"})
		if err != nil {
			wantDecodeError(t, err)
			return
		}
		defer w.Abort()
		pages := l.blocks[0].Pages()
		for i := range pages {
			if err := w.WritePages(0, i, fresh); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.WriteDeviceState(bytes.NewReader(nil)); err != nil {
			t.Fatal(err)
		}
		s, err := w.Finish(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		c := testManifest(s)
		c.Hot = nil
		data, err = EncodeManifest(c)
		if err != nil {
			t.Fatal(err)
		}
		if f, err := fs.Create("/c/" + ManifestName); err != nil || f.WriteVec([][]byte{data}, 0) != nil {
			t.Fatal(err)
		}
		child, err := OpenReaderFS(fs, "/c")
		if err != nil {
			t.Fatal(err)
		}
		defer child.Close()
		page := make([]byte, 4096)
		for i := range pages {
			if _, err := child.ReadPage(0, i, page); err != nil {
				wantDecodeError(t, err)
			} else if !bytes.Equal(page, fresh) {
				t.Fatalf("page %d differs", i)
			}
		}
	})
}
