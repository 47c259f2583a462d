package image

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"unicode/utf8"
)

// knownFeatures are the entries of Manifest.Requires this version understands.
var knownFeatures = map[string]bool{FeatureDisks: true, FeatureChain: true}

// FeatureChain is required of the reader of a checkpoint whose pages share places, with
// each other or with other checkpoints.
const FeatureChain = "chain"

// needsChain reports whether the manifest says what FeatureChain stands for.
func (m *Manifest) needsChain() bool {
	return m.Tags != nil || m.Depth != 0 || slices.ContainsFunc(m.Segments, func(s Segment) bool {
		return s.Owner != "" || s.VM != "" || s.Pages != 0
	})
}

// ValidFileName reports whether a name found in a manifest may be opened: one
// path component of plain characters that starts with a letter. That leaves out
// separators, "..", hidden files, and the store's own files, which have a dot.
func ValidFileName(name string) bool {
	if name == "" || len(name) > 64 || name[0] < 'a' || name[0] > 'z' {
		return false
	}
	for _, c := range []byte(name) {
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
			return false
		}
	}
	return true
}

// ValidID reports whether s can be the id of a checkpoint (or of a group).
func ValidID(s string) bool {
	if s == "" || len(s) > 64 || s[0] == '.' || s[0] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' ||
			c == '-' || c == '_' || c == '.') {
			return false
		}
	}
	return true
}

func validWord(s string, empty bool) bool {
	if s == "" {
		return empty
	}
	if len(s) > 64 {
		return false
	}
	for _, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-_.+/ ", c) >= 0) {
			return false
		}
	}
	return true
}

// ValidateBlocks checks the blocks of a checkpoint against the format.
func ValidateBlocks(blocks []Block) error {
	if len(blocks) == 0 || len(blocks) > MaxBlocks {
		return fmt.Errorf("%d blocks: a checkpoint has 1 to %d", len(blocks), MaxBlocks)
	}
	names := make(map[string]bool, len(blocks))
	var ram uint64
	for i, b := range blocks {
		switch {
		case b.Name == "" || len(b.Name) > MaxNameBytes || !utf8.ValidString(b.Name) || strings.ContainsRune(b.Name, 0):
			return fmt.Errorf("block %d: bad name %.60q", i, b.Name)
		case names[b.Name]:
			return fmt.Errorf("block %q appears twice", b.Name)
		case b.PageBytes < MinPageBytes || b.PageBytes > MaxPageBytes || b.PageBytes&(b.PageBytes-1) != 0:
			return fmt.Errorf("block %q: page size of %d bytes: not a power of two from %d to %d", b.Name, b.PageBytes, MinPageBytes, MaxPageBytes)
		case b.UsedBytes > MaxRAMBytes || b.UsedBytes%b.PageBytes != 0:
			return fmt.Errorf("block %q: %d bytes used: not a multiple of its page size up to %d", b.Name, b.UsedBytes, uint64(MaxRAMBytes))
		case b.TotalBytes < b.UsedBytes:
			return fmt.Errorf("block %q: %d bytes in all are fewer than the %d used", b.Name, b.TotalBytes, b.UsedBytes)
		case b.GPA < -1:
			return fmt.Errorf("block %q: guest physical address %d", b.Name, b.GPA)
		}
		if err := validateRanges(b); err != nil {
			return fmt.Errorf("block %q: %w", b.Name, err)
		}
		names[b.Name] = true
		if ram += b.UsedBytes; ram > MaxRAMBytes { // no overflow: each is bounded, and so is their number
			return fmt.Errorf("blocks hold more than %d bytes", uint64(MaxRAMBytes))
		}
	}
	return nil
}

// validateRanges checks that every range lies within the block and within 64 bits.
func validateRanges(b Block) error {
	if len(b.Ranges) > MaxBlockRanges {
		return fmt.Errorf("%d ranges: more than %d", len(b.Ranges), MaxBlockRanges)
	}
	for _, g := range b.Ranges {
		if g.Bytes == 0 || g.Offset > b.TotalBytes || g.Bytes > b.TotalBytes-g.Offset || g.GPA > math.MaxInt64-g.Bytes {
			return fmt.Errorf("range of %d bytes from %d at guest physical address %#x: outside", g.Bytes, g.Offset, g.GPA)
		}
	}
	return nil
}

// Validate checks everything that can be checked without another file.
func (m *Manifest) Validate() error {
	if m.Format != FormatName {
		return fmt.Errorf("format %.40q: not %s", m.Format, FormatName)
	}
	if m.Version < 1 || m.Minor < 0 {
		return fmt.Errorf("version %d.%d", m.Version, m.Minor)
	}
	if len(m.Requires) > 64 {
		return errors.New("more than 64 required features")
	}
	if !ValidID(m.ID) {
		return fmt.Errorf("bad id %.80q", m.ID)
	}
	if m.VM == "" || len(m.VM) > MaxNameBytes || !utf8.ValidString(m.VM) || strings.ContainsRune(m.VM, 0) {
		return fmt.Errorf("bad VM name %.80q", m.VM)
	}
	if m.Parent != "" && (!ValidID(m.Parent) || m.Parent == m.ID) {
		return fmt.Errorf("bad parent %.80q", m.Parent)
	}
	if m.Depth < 0 || m.Depth > MaxDepth || m.Depth > 0 && m.Parent == "" {
		return fmt.Errorf("depth %d with parent %.80q", m.Depth, m.Parent)
	}
	if m.needsChain() != slices.Contains(m.Requires, FeatureChain) {
		return fmt.Errorf("tags, depth or shared segments and requires %q do not go together", m.Requires)
	}
	if m.GroupID != "" && !ValidID(m.GroupID) {
		return fmt.Errorf("bad group %.80q", m.GroupID)
	}
	if y := m.CreatedAt.Year(); y < 2000 || y > 9999 {
		return fmt.Errorf("created in the year %d", y)
	}
	if !validWord(m.Mode, true) || !validWord(m.Engine, true) {
		return fmt.Errorf("bad mode %.40q or engine %.40q", m.Mode, m.Engine)
	}
	if err := ValidateBlocks(m.Blocks); err != nil {
		return err
	}
	if err := m.validateFiles(); err != nil {
		return err
	}
	if err := m.validateStats(); err != nil {
		return err
	}
	if err := m.validateDisks(); err != nil {
		return err
	}
	if len(m.Hot) > MaxHotRuns {
		return fmt.Errorf("%d hot runs: more than %d", len(m.Hot), MaxHotRuns)
	}
	for i, r := range m.Hot {
		if r.Block < 0 || r.Block >= len(m.Blocks) || r.Pages == 0 ||
			r.First > m.Blocks[r.Block].Pages() || r.Pages > m.Blocks[r.Block].Pages()-r.First {
			return fmt.Errorf("hot run %d (block %d, page %d + %d) is outside the blocks", i, r.Block, r.First, r.Pages)
		}
	}
	return nil
}

func (m *Manifest) validateFiles() error {
	if len(m.Segments) > MaxSegments {
		return fmt.Errorf("%d segments: more than %d", len(m.Segments), MaxSegments)
	}
	files := map[string]bool{}
	name := func(n string) error {
		if !ValidFileName(n) {
			return fmt.Errorf("file name %.80q is not allowed", n)
		}
		if files[n] {
			return fmt.Errorf("file %s is named twice", n)
		}
		files[n] = true
		return nil
	}
	if err := name(m.DeviceState.Name); err != nil {
		return err
	}
	if m.DeviceState.Bytes > MaxDeviceStateBytes {
		return fmt.Errorf("device state of %d bytes: more than %d", m.DeviceState.Bytes, MaxDeviceStateBytes)
	}
	if err := name(m.Pagemap.Name); err != nil {
		return err
	}
	if t := m.Tags; t != nil {
		if err := name(t.Name); err != nil {
			return err
		}
		if err := t.validate(m); err != nil {
			return fmt.Errorf("tags: %w", err)
		}
	}
	l := layoutOf(m.Blocks)
	if m.Pagemap.HeadBytes != l.headBytes || m.Pagemap.Bytes != l.fileBytes() {
		return fmt.Errorf("pagemap of %d bytes with a head of %d: these blocks take %d and %d",
			m.Pagemap.Bytes, m.Pagemap.HeadBytes, l.fileBytes(), l.headBytes)
	}
	for _, s := range m.Segments {
		if err := name(s.Name); err != nil {
			return err
		}
		if err := s.validateOwner(m); err != nil {
			return fmt.Errorf("segment %s: %w", s.Name, err)
		}
		if s.Bytes > maxSegmentBytes {
			return fmt.Errorf("segment %s of %d bytes: more than %d", s.Name, s.Bytes, uint64(maxSegmentBytes))
		}
		switch s.Kind {
		case SegmentRaw:
			if s.Bytes%MinPageBytes != 0 {
				return fmt.Errorf("raw segment %s of %d bytes: not a multiple of %d", s.Name, s.Bytes, MinPageBytes)
			}
		case SegmentFrames:
			if s.Bytes%frameAlign != 0 {
				return fmt.Errorf("frame segment %s of %d bytes: not a multiple of %d", s.Name, s.Bytes, frameAlign)
			}
		default:
			return fmt.Errorf("segment %s of unknown kind %.40q", s.Name, s.Kind)
		}
	}
	return nil
}

func (m *Manifest) validateStats() error {
	var ram, pages uint64
	for _, b := range m.Blocks {
		ram += b.UsedBytes
		pages += b.Pages()
	}
	s := m.Stats
	if s.RAMBytes != ram || s.Pages != pages {
		return fmt.Errorf("%d bytes in %d pages: the blocks have %d in %d", s.RAMBytes, s.Pages, ram, pages)
	}
	if s.ZeroPages > pages || s.CapturedPages > pages {
		return fmt.Errorf("%d zero and %d captured pages of %d", s.ZeroPages, s.CapturedPages, pages)
	}
	stored := m.DeviceState.Bytes + m.Pagemap.Bytes
	if m.Tags != nil {
		stored += m.Tags.Bytes
	}
	for _, seg := range m.Segments {
		if seg.Owner == "" {
			stored += seg.Bytes
		}
	}
	if s.StoredBytes != stored {
		return fmt.Errorf("%d bytes stored: the files have %d", s.StoredBytes, stored)
	}
	return nil
}

// validateOwner checks what a segment says about where it comes from.
func (s *Segment) validateOwner(m *Manifest) error {
	switch {
	case s.Owner != "" && (!ValidID(s.Owner) || s.Owner == m.ID):
		return fmt.Errorf("bad owner %.80q", s.Owner)
	case s.VM != "" && (s.Owner == "" || s.VM == m.VM || len(s.VM) > MaxNameBytes || !utf8.ValidString(s.VM)):
		return fmt.Errorf("bad VM %.80q", s.VM)
	case s.Pages > m.Stats.Pages:
		return fmt.Errorf("%d pages: the checkpoint has %d", s.Pages, m.Stats.Pages)
	}
	return nil
}

// validate checks the tags against the blocks: one for each page that is not zeros.
func (t *TagsRef) validate(m *Manifest) error {
	if n := m.Stats.Pages - min(m.Stats.ZeroPages, m.Stats.Pages); t.Bytes != n*TagBytes {
		return fmt.Errorf("%d bytes for %d pages that are not zeros", t.Bytes, n)
	}
	if t.Scope == "" || len(t.Scope) > maxScopeBytes || !utf8.ValidString(t.Scope) {
		return fmt.Errorf("bad scope %.80q", t.Scope)
	}
	if id, err := hex.DecodeString(t.Key); err != nil || len(id) != keyIDBytes || strings.ToLower(t.Key) != t.Key {
		return fmt.Errorf("bad key %.80q", t.Key)
	}
	return nil
}
