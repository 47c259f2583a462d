package pager

import (
	"context"
	"encoding/json"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
)

// SourceImage is a checkpoint's directory on a local file system.
const SourceImage = "image"

type imageParams struct {
	Dir string `json:"dir"`
}

// ImageSpec is the SourceSpec of a checkpoint's directory.
func ImageSpec(dir string) *SourceSpec {
	params, err := json.Marshal(imageParams{Dir: dir})
	if err != nil {
		panic(err) // a string always has an encoding
	}
	return &SourceSpec{Kind: SourceImage, Params: params}
}

func openImage(ctx context.Context, params json.RawMessage) (PageSource, error) {
	var p imageParams
	if err := unmarshalStrict(params, &p); err != nil {
		return nil, problem.New(problem.Usage, "open source", SourceImage, "%w", err)
	}
	return OpenImageSource(ctx, p.Dir)
}

// imageSource serves from an image.Reader, which checks every page it returns.
type imageSource struct{ r *image.Reader }

// OpenImageSource opens the checkpoint in dir as a source of pages. Blocks of huge
// pages have no pages here: they are not served page by page.
func OpenImageSource(ctx context.Context, dir string) (PageSource, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r, err := image.OpenReader(dir)
	if err != nil {
		return nil, err
	}
	return &imageSource{r}, nil
}

func (s *imageSource) Blocks() []uint64 {
	blocks := s.r.Manifest().Blocks
	pages := make([]uint64, len(blocks))
	for i, b := range blocks {
		if b.PageBytes == PageBytes {
			pages[i] = b.Pages()
		}
	}
	return pages
}

func (s *imageSource) Extent(block int, first, limit uint64) (zero bool, pages uint64, err error) {
	pages, zero, err = s.r.Extent(block, first, limit)
	return zero, pages, err
}

func (s *imageSource) ReadRun(ctx context.Context, _ Class, block int, first uint64, dst []byte) (int, error) {
	_, err := s.r.ReadRun(block, first, dst)
	n := len(dst) / PageBytes
	if err == nil {
		return n, nil
	}
	if n == 1 {
		return 0, err
	}
	// Some page of the run is bad: find out how many before it are good.
	for i := range n {
		if ctx.Err() != nil {
			return i, ctx.Err()
		}
		if _, err := s.r.ReadPage(block, first+uint64(i), dst[i*PageBytes:(i+1)*PageBytes]); err != nil {
			return i, err
		}
	}
	return n, nil // it was passing
}

func (s *imageSource) Hot() []Run {
	hot := s.r.Manifest().Hot
	runs := make([]Run, 0, min(len(hot), maxHot))
	for _, h := range hot[:cap(runs)] {
		runs = append(runs, Run{Block: h.Block, First: h.First, Pages: h.Pages})
	}
	return runs
}

func (s *imageSource) Close() error { return s.r.Close() }
