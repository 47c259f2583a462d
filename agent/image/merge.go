package image

import (
	"context"
	"strconv"
	"strings"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// MergeOptions tune Merge.
type MergeOptions struct {
	FS       fsys.FS // default: the host's file system
	Compress string  // of what is rewritten: none, s2 or zstd
	// Absorb picks the segments of other checkpoints whose pages become this one's own.
	Absorb func(*Segment) bool
}

// mergeStep is how much is read and written at a time.
const mergeStep = 1 << 20

// Merge rewrites an image so that it needs fewer segments of others: the pages that lie
// in those that Absorb picks are copied, each checked, to segments of its own. It writes
// new files beside the old ones, durably, and returns the manifest that names them; the
// image is the old one until that manifest is in place, and whoever reads the old one
// may go on. Files that the new manifest does not name are the caller's to remove.
//
// It uses one goroutine: nobody waits for it.
func Merge(ctx context.Context, r *Reader, o MergeOptions) (*Manifest, error) {
	const op = "merge"
	m := *r.manifest
	if m.Tags == nil {
		return nil, problem.New(problem.Refused, op, r.dir, "the checkpoint has no tags")
	}
	w, err := NewWriter(r.dir, m.Blocks, WriterOptions{FS: o.FS, Compress: o.Compress, Lanes: 1, Parent: r, VM: m.VM,
		Dedup: true, merge: true, generation: generationOf(&m) + 1})
	if err != nil {
		return nil, err
	}
	defer w.Abort()
	w.state.ref, w.state.written = m.DeviceState, true
	if err := mergePages(ctx, r, w, o.Absorb); err != nil {
		return nil, err
	}
	sum, err := w.Finish(ctx)
	if err != nil {
		return nil, err
	}
	sum.Apply(&m)
	full := true
	for i := range m.Segments {
		// Content shared with other VMs is no step of the chain.
		full = full && (m.Segments[i].Owner == "" || m.Segments[i].VM != "")
	}
	if full {
		m.Parent, m.Depth = "", 0
	}
	return &m, nil
}

func mergePages(ctx context.Context, r *Reader, w *Writer, absorb func(*Segment) bool) error {
	picked := make([]bool, len(r.manifest.Segments))
	for i := range picked {
		s := r.manifest.Segments[i]
		picked[i] = s.Owner != "" && absorb(&s)
	}
	for block, b := range r.manifest.Blocks {
		step := max(mergeStep/b.PageBytes, 1)
		buf := make([]byte, min(step, max(b.Pages(), 1))*b.PageBytes)
		for first := uint64(0); first < b.Pages(); {
			if ctx.Err() != nil {
				return cancelled("merge", r.dir, ctx.Err())
			}
			n, take, err := r.alike(block, first, step, picked)
			if err != nil {
				return err
			}
			if !take {
				err = w.WriteUnchanged(block, first, n)
			} else if _, err = r.ReadRun(block, first, buf[:n*b.PageBytes]); err == nil {
				err = w.WritePages(block, first, buf[:n*b.PageBytes])
			}
			if err != nil {
				return err
			}
			first += n
		}
	}
	return nil
}

// alike counts the pages from first on, at most limit, that all lie in picked segments
// or all do not.
func (r *Reader) alike(block int, first, limit uint64, picked []bool) (n uint64, take bool, err error) {
	if err := r.enter("merge"); err != nil {
		return 0, false, err
	}
	defer r.life.RUnlock()
	limit = min(limit, r.manifest.Blocks[block].Pages()-first)
	for ; n < limit; n++ {
		l, _, err := r.entry(block, first+n)
		if err != nil {
			return 0, false, err
		}
		in := l != zeroLocation && picked[l.segment()]
		if n > 0 && in != take {
			break
		}
		take = in
	}
	return n, take, nil
}

// generationOf is how often an image was rewritten, by the names of its files.
func generationOf(m *Manifest) int {
	rest, ok := strings.CutPrefix(m.Pagemap.Name, pagemapName+"-m")
	if !ok {
		return 0
	}
	n, err := strconv.Atoi(rest)
	if err != nil || n < 0 {
		return 0
	}
	return n
}

// Named lists the files of the checkpoint's directory that the manifest names.
func (m *Manifest) Named() map[string]bool {
	names := map[string]bool{ManifestName: true, m.Pagemap.Name: true, m.DeviceState.Name: true}
	if m.Tags != nil {
		names[m.Tags.Name] = true
	}
	for i := range m.Segments {
		names[m.Segments[i].Name] = true
	}
	return names
}

// IsImageFile reports whether a name is one that images give to their files.
func IsImageFile(name string) bool {
	for _, prefix := range []string{pagemapName, tagsName, deviceStateName, "seg-"} {
		if strings.HasPrefix(name, prefix) && ValidFileName(name) {
			return true
		}
	}
	return false
}
