package image

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/ckagent/ckagent/agent/image/fsys"
)

// fileName is the name of a file that the Writer makes. One that rewrites an image has
// names of its own, beside those of the files that are read meanwhile.
func (w *Writer) fileName(name string) string {
	if w.o.generation == 0 {
		return name
	}
	mark := fmt.Sprintf("-m%d", w.o.generation)
	if rest, ok := strings.CutPrefix(name, "seg"); ok {
		return "seg" + mark + rest
	}
	return name + mark
}

// settleSegments makes the table of the segments: those that pages lie in, with how
// many do. Those that were taken over for nothing go, and the entries are renumbered.
func (w *Writer) settleSegments(s *Summary) error {
	all := append([]Segment(nil), w.base...)
	for _, g := range w.segs.list {
		all = append(all, Segment{Name: g.name, Bytes: g.size, Kind: g.kind})
	}
	if w.tags == nil { // nothing was taken over, and nothing is counted
		s.Segments = all
		for i := range all {
			s.StoredBytes += all[i].Bytes
		}
		return nil
	}
	for e := w.entries; len(e) > 0; e = e[entryBytes:] {
		if l, _ := getEntry(e); l != zeroLocation {
			all[l.segment()].Pages++
		}
	}
	number := make([]int, len(all))
	for i := range all {
		number[i] = len(s.Segments)
		if all[i].Pages == 0 {
			if i >= len(w.base) || !w.o.merge { // else somebody may be reading it
				path := filepath.Join(w.dir, all[i].Name)
				if err := w.fs.Remove(path); err != nil {
					return fsys.Problem("give segment back", path, err)
				}
			}
			continue
		}
		s.Segments = append(s.Segments, all[i])
		if all[i].Owner == "" {
			s.StoredBytes += all[i].Bytes
		}
	}
	if len(s.Segments) == len(all) {
		return nil
	}
	for e := w.entries; len(e) > 0; e = e[entryBytes:] {
		if l, sum := getEntry(e); l != zeroLocation {
			putEntry(e, l&^(location(MaxSegments-1)<<segmentShift)|location(number[l.segment()])<<segmentShift, sum)
		}
	}
	return nil
}

// writeTags writes the tags of the pages that are not zeros.
func (w *Writer) writeTags() (*TagsRef, error) {
	const op = "write tags"
	ref := w.tagsRef
	ref.Name = w.fileName(tagsName)
	path := filepath.Join(w.dir, ref.Name)
	// In place: nothing is looked for any more.
	data := w.tags[:0]
	for i := range w.layout.entries {
		if l, _ := getEntry(w.entries[i*entryBytes:]); l != zeroLocation {
			data = append(data, w.tags[i*TagBytes:(i+1)*TagBytes]...)
		}
	}
	ref.Bytes, ref.Checksum = uint64(len(data)), Sum(data)
	var bufs [][]byte
	if len(data) > 0 {
		bufs = append(bufs, data)
	}
	if err := w.writeWhole(path, bufs); err != nil {
		return nil, fsys.Problem(op, path, err)
	}
	return &ref, nil
}
