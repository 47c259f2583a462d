package image

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// A Writer takes pages over from other images: those that did not change from its
// parent, those that lie elsewhere from its donors. It gives each segment of them
// another name in its own directory (a hard link), so that its image is whole by
// itself, whatever becomes of the others.

// Usable reports why an image cannot be the parent or a donor of another that is
// written with this key; nil if it can.
func Usable(m *Manifest, key *TagKey) error {
	switch {
	case m.Tags == nil:
		return fmt.Errorf("checkpoint %s has no tags of its pages", m.ID)
	case !m.Tags.made(key):
		return fmt.Errorf("the tags of checkpoint %s were made in scope %q with another key", m.ID, m.Tags.Scope)
	}
	return nil
}

// MaxInherited bounds the segments that an image takes over.
const MaxInherited = MaxSegments / 2

// inheritedName is the name of another image's segment in a directory that is not its
// own: the same wherever it comes to.
func inheritedName(m *Manifest, s *Segment) string {
	if s.Owner != "" {
		return s.Name
	}
	return "seg-" + strings.ToLower(m.ID) + strings.TrimPrefix(s.Name, "seg")
}

// inherit fills the Writer's table of segments, its entries and its index from parent
// and donors.
func (w *Writer) inherit(o *WriterOptions) error {
	places := map[string]int{} // by name
	if p := o.Parent; p != nil {
		if err := w.inheritSegments(p, places); err != nil {
			return err
		}
		if err := w.inheritPages(p); err != nil {
			return err
		}
	}
	switch {
	case !o.Dedup:
		return nil
	case o.merge: // what it keeps becomes known as it is kept
		w.index = newTagIndex(w, 0)
		return nil
	}
	donors := o.Donors
	if o.Parent != nil {
		// Its pages too: a guest moves pages about.
		donors = append([]*Reader{o.Parent}, donors...)
	}
	pages := uint64(0)
	for _, d := range donors {
		pages += d.manifest.Stats.Pages - min(d.manifest.Stats.ZeroPages, d.manifest.Stats.Pages)
	}
	w.index = newTagIndex(w, int(min(pages, maxIndexed)))
	for _, d := range donors {
		if len(w.base)+len(d.manifest.Segments) > MaxInherited {
			break
		}
		if err := w.inheritSegments(d, places); err != nil {
			return err
		}
		err := d.eachTagged(func(block int, page uint64, l location, sum uint64, t Tag) {
			if d.manifest.Blocks[block].PageBytes == MinPageBytes {
				w.index.addDonor(t, w.replace(d, l), sum)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// inheritSegments makes the segments of an image this one's.
func (w *Writer) inheritSegments(r *Reader, places map[string]int) error {
	m := r.manifest
	if len(m.Segments) > MaxInherited {
		return problem.New(problem.Refused, "take over segments", r.dir, "it has %d: more than %d", len(m.Segments), MaxInherited)
	}
	if w.moved == nil {
		w.moved = map[*Reader][]int{}
	}
	if w.moved[r] != nil {
		return nil // the parent, as a donor
	}
	moved := make([]int, len(m.Segments))
	for i := range m.Segments {
		s := m.Segments[i]
		s.Pages = 0 // counted at the end
		if !w.o.merge {
			if s.Name = inheritedName(m, &s); s.Owner == "" {
				s.Owner = m.ID
			}
			if s.VM == "" && m.VM != w.o.VM {
				s.VM = m.VM
			}
			if s.VM == w.o.VM {
				s.VM = ""
			}
		}
		at, known := places[s.Name]
		if !known {
			if !w.o.merge {
				to := filepath.Join(w.dir, s.Name)
				if err := w.fs.Link(r.path(m.Segments[i].Name), to); err != nil {
					return fsys.Problem("take over segment", to, err)
				}
			}
			at = len(w.base)
			places[s.Name] = at
			w.base = append(w.base, s)
		}
		moved[i] = at
	}
	w.moved[r] = moved
	return nil
}

// giveBack takes the names away that inheritSegments gave.
func (w *Writer) giveBack() {
	if w.o.merge {
		return
	}
	for i := range w.base {
		_ = w.fs.Remove(filepath.Join(w.dir, w.base[i].Name)) // else they go with the directory
	}
}

// replace turns an image's location into the Writer's.
func (w *Writer) replace(r *Reader, l location) location {
	if l.kind() == kindZero {
		return l
	}
	return l&^(location(MaxSegments-1)<<segmentShift) | location(w.moved[r][l.segment()])<<segmentShift
}

// inheritPages fills entries and tags from the parent, block by block of the same name
// and size of pages. Other pages stay absent.
func (w *Writer) inheritPages(p *Reader) error {
	ours := map[string]int{}
	for i, b := range w.blocks {
		ours[b.Name] = i
	}
	to := make([]int, len(p.manifest.Blocks))
	for i, b := range p.manifest.Blocks {
		to[i] = -1
		if k, ok := ours[b.Name]; ok && w.blocks[k].PageBytes == b.PageBytes {
			to[i] = k
		}
	}
	return p.eachPage(func(block int, page uint64, l location, sum uint64, t Tag) {
		k := to[block]
		if k < 0 || page >= w.blocks[k].Pages() {
			return
		}
		n := w.layout.firstEntry[k] + page
		putEntry(w.entries[n*entryBytes:], w.replace(p, l), sum)
		w.setTag(n, &t)
	})
}

// eachTagged calls yield for every page that is not zeros.
func (r *Reader) eachTagged(yield func(block int, page uint64, l location, sum uint64, t Tag)) error {
	return r.eachPage(func(block int, page uint64, l location, sum uint64, t Tag) {
		if l != zeroLocation {
			yield(block, page, l, sum, t)
		}
	})
}

// eachPage calls yield for every page, with its tag unless it is zeros. The tags are
// checked as they pass: after an error, what was yielded is worth nothing.
func (r *Reader) eachPage(yield func(block int, page uint64, l location, sum uint64, t Tag)) error {
	const op = "read tags"
	if err := r.enter(op); err != nil {
		return err
	}
	defer r.life.RUnlock()
	tags, err := r.openTags()
	if err != nil {
		return err
	}
	defer tags.close()
	for i, b := range r.manifest.Blocks {
		for first := uint64(0); first < b.Pages(); first += chunkEntries {
			c, err := r.readChunk(i, first/chunkEntries) // not kept: it is wanted once
			if err != nil {
				return err
			}
			for k := range uint64(len(c.entries) / entryBytes) {
				l, sum := getEntry(c.entries[k*entryBytes:])
				if err := r.checkEntry(i, first+k, l, sum); err != nil {
					return err
				}
				var t Tag
				if l != zeroLocation {
					if t, err = tags.next(); err != nil {
						return err
					}
				}
				yield(i, first+k, l, sum, t)
			}
		}
	}
	left, err := tags.finish()
	if err != nil {
		return err
	}
	if left > 0 {
		return corrupt(op, tags.path, "it has %d tags more than there are pages that are not zeros", left/TagBytes)
	}
	return nil
}

// WriteUnchanged records that n pages have the content they had in the parent, on the
// word of whoever tracked the guest's writes. Safe for concurrent use.
func (w *Writer) WriteUnchanged(block int, firstPage, n uint64) error {
	w.life.RLock()
	defer w.life.RUnlock()
	if block < 0 || block >= len(w.blocks) {
		return w.misuse(block, firstPage, "no such block")
	}
	if err := w.claim(block, firstPage, n); err != nil {
		return err
	}
	zeros, number := uint64(0), w.layout.firstEntry[block]+firstPage
	for i := range n {
		switch l, _ := getEntry(w.entries[(number+i)*entryBytes:]); {
		case l.kind() == kindAbsent:
			return w.misuse(block, firstPage+i, "the parent does not have the page that is called unchanged")
		case l.kind() == kindZero:
			zeros++
		case w.o.merge:
			w.known(number+i, 1, w.blocks[block].PageBytes)
		}
	}
	w.pages.Add(n)
	w.zeroPages.Add(zeros)
	w.unchangedPages.Add(n - zeros)
	return nil
}

// tagOf is the tag of the page with this number among all.
func (w *Writer) tagOf(number uint64) Tag { return Tag(w.tags[number*TagBytes:][:TagBytes]) }

func (w *Writer) setTag(number uint64, t *Tag) { copy(w.tags[number*TagBytes:], t[:]) }

// settled reports whether the content of a page, which is not zeros, lies somewhere
// already, and makes its entry refer to it. If not, the page's tag is noted and the
// caller stores it.
func (l *lane) settled(w *Writer, number uint64, page []byte) bool {
	if w.tags == nil {
		return false
	}
	e := w.entries[number*entryBytes:]
	if !w.o.merge { // there, what is given has the tag that it had
		w.key.sum(&l.tag, page)
		was, _ := getEntry(e)
		if k := was.kind(); (k == kindRaw || k == kindFrame) && w.tagOf(number) == l.tag {
			w.unchangedPages.Add(1)
			return true
		}
		w.setTag(number, &l.tag)
	} else {
		l.tag = w.tagOf(number)
	}
	if w.index == nil || len(page) != MinPageBytes {
		return false
	}
	place, sum, ok := w.index.find(&l.tag)
	if ok {
		putEntry(e, place, sum)
		w.sharedPages.Add(1)
	}
	return ok
}

// known has the index know pages whose entries are final.
func (w *Writer) known(number, n uint64, pageBytes uint64) {
	if w.index == nil || pageBytes != MinPageBytes {
		return
	}
	for i := range n {
		w.index.add(number + i)
	}
}

// ErrNoLinks says that segments cannot be taken over in this file system, and that an
// image there has to be a full one.
var ErrNoLinks = fsys.ErrNoLinks

// NotInherited reports whether an error of NewWriter was about parent and donors, so that
// an image without them may succeed: no links, or damage in one of them.
func NotInherited(err error) bool {
	return errors.Is(err, ErrNoLinks) || problem.Is(err, problem.Integrity) || problem.Is(err, problem.Refused)
}
