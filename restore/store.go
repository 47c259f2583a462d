package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/restore/pager"
)

// SourceStore is the kind of page source that reads a checkpoint of a store and
// holds a lease on it for as long as it is open: by the pager itself, so that
// nobody removes the checkpoint after the restore command has ended. Worker and
// supervisor hold one each: where one of them has died, the other's counts.
const SourceStore = "store"

type storeParams struct {
	Store string `json:"store"`
	ID    string `json:"id"`
}

// Openers are the kinds of page sources that a pager process has to know beyond its
// own; the hidden verb passes them to pager.Main.
func Openers() map[string]pager.Opener {
	return map[string]pager.Opener{SourceStore: openStoreSource}
}

// Keepers are the same for the supervisor, which reads no page.
func Keepers() map[string]pager.Keeper {
	return map[string]pager.Keeper{SourceStore: keepStoreSource}
}

// leased is a page source and the lease that keeps its files.
type leased struct {
	pager.PageSource
	image *store.Image
}

func (l *leased) Close() error { return errors.Join(l.PageSource.Close(), l.image.Close()) }

// openLeased opens the checkpoint that raw names, with a lease.
func openLeased(ctx context.Context, raw json.RawMessage) (*store.Image, error) {
	var p storeParams
	if err := json.Unmarshal(raw, &p); err != nil {
		return nil, problem.New(problem.Usage, "open source", SourceStore, "%w", err)
	}
	st, err := store.Open(p.Store)
	if err != nil {
		return nil, err
	}
	return st.OpenImage(ctx, p.ID)
}

func keepStoreSource(ctx context.Context, raw json.RawMessage) (io.Closer, error) {
	img, err := openLeased(ctx, raw)
	if err != nil {
		return nil, err // and no nil *store.Image in an interface
	}
	return img, nil
}

func openStoreSource(ctx context.Context, raw json.RawMessage) (pager.PageSource, error) {
	img, err := openLeased(ctx, raw)
	if err != nil {
		return nil, err
	}
	src, err := pager.OpenImageSource(ctx, img.Dir())
	if err != nil {
		return nil, errors.Join(err, img.Close())
	}
	return &leased{src, img}, nil
}

// Run restores the checkpoint that ref names: an id, or a VM, whose newest
// checkpoint that verifies is taken. A newer one that was passed over is named in
// Result.Notes. Where the Result is not nil the guest runs
// (or was told to, and did not say that it does: the error tells), whatever the error.
func Run(ctx context.Context, st *store.Store, ref string, o Options) (*Result, error) {
	began := time.Now()
	sel, err := st.Get(ctx, ref, store.GetOptions{})
	if err != nil {
		return nil, err
	}
	img, err := st.OpenImage(ctx, sel.Info.ID)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	params, err := json.Marshal(storeParams{Store: st.Dir(), ID: sel.Info.ID})
	if err != nil {
		return nil, problem.New(problem.Failed, "restore", sel.Info.ID, "%w", err)
	}
	x := newRun(img.Reader, &pager.SourceSpec{Kind: SourceStore, Params: params}, began, o)
	x.keep = img
	for _, s := range sel.Skipped {
		x.note("checkpoint %s is newer but cannot be used: %v", s.ID, s.Err)
	}
	res, err := x.do(ctx)
	if err == nil {
		return res, nil
	}
	return res, fmt.Errorf("checkpoint %s: %w", sel.Info.ID, err)
}
