package image

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ckagent/ckagent/agent/problem"
)

func encoded(t testing.TB) (*Manifest, []byte) {
	t.Helper()
	_, m, _, _ := smallImage(t, "none")
	m.Hot = HotRuns{{0, 39, 1}, {0, 0, 4}}
	m.Machine.LibvirtXML = "<domain type='qemu'/>\n"
	m.Blocks[0].Ranges = []GPARange{{0, 0, 40960}, {1 << 32, 40960, 4096}}
	data, err := EncodeManifest(m)
	if err != nil {
		t.Fatal(err)
	}
	return m, data
}

func TestManifestRoundTrip(t *testing.T) {
	m, data := encoded(t)
	got, err := DecodeManifest("x", data)
	if err != nil {
		t.Fatal(err)
	}
	m.Requires = []string{}
	m.CreatedAt = m.CreatedAt.UTC()
	if diff := cmp.Diff(m, got); diff != "" {
		t.Error(diff)
	}
	var plain map[string]any
	if err := json.Unmarshal(data, &plain); err != nil {
		t.Errorf("not plain JSON: %v", err)
	}
	if trailerBytes != 41 {
		t.Errorf("the trailer has %d bytes: FORMAT.md says 41", trailerBytes)
	}
}

// TestManifestRefusals changes the text and makes the checksum right again.
func TestManifestRefusals(t *testing.T) {
	_, data := encoded(t)
	long := strings.Repeat("[", 40) + strings.Repeat("]", 40)
	for name, c := range map[string]struct {
		old, new string
		code     problem.Code // "": accepted
	}{
		"same":                  {`"mode"`, `"mode"`, ""},
		"major from the future": {`"version": 1`, `"version": 2`, problem.Refused},
		"future and new fields": {`"version": 1`, `"version": 2, "x": {}`, problem.Refused},
		"future and new types":  {`"version": 1,`, `"version": 2, "blocks": "none", `, problem.Integrity}, // the key is there twice
		"feature":               {`"requires": []`, `"requires": ["deltas"]`, problem.Refused},
		"minor with new field":  {`"minor": 2`, `"minor": 3, "x": {"y": [1]}`, ""},
		"unknown field":         {`"minor": 2`, `"minor": 2, "x": 1`, problem.Integrity},
		"range beyond block":    {`"bytes": 40960`, `"bytes": 99999999999`, problem.Integrity},
		"range of nothing":      {`"bytes": 40960`, `"bytes": 0`, problem.Integrity},
		"range beyond 64 bits":  {`"gpa": 4294967296`, `"gpa": 18446744073709551000`, problem.Integrity},
		"other format":          {`"ckagent-checkpoint"`, `"something"`, problem.Integrity},
		"version 0":             {`"version": 1`, `"version": 0`, problem.Integrity},
		"key twice":             {`"mode": "cow"`, `"mode": "cow", "mode": "stop"`, problem.Integrity},
		"key twice, other case": {`"mode": "cow"`, `"mode": "cow", "Mode": "stop"`, problem.Integrity},
		"null":                  {`"mode": "cow"`, `"mode": null`, problem.Integrity},
		"deep":                  {`"minor": 2`, `"minor": 3, "x": ` + long, problem.Integrity},
		"path up":               {`"name": "pagemap"`, `"name": "../pagemap"`, problem.Integrity},
		"absolute path":         {`"name": "pagemap"`, `"name": "/pagemap"`, problem.Integrity},
		"hidden":                {`"name": "pagemap"`, `"name": ".pagemap"`, problem.Integrity},
		"the manifest itself":   {`"name": "pagemap"`, `"name": "manifest.json"`, problem.Integrity},
		"two names alike":       {`"name": "pagemap"`, `"name": "seg-0000"`, problem.Integrity},
		"id with a slash":       {`"id": "2026`, `"id": "/2026`, problem.Integrity},
		"huge block":            {`"used_bytes": 163840`, `"used_bytes": 18446744073709547520`, problem.Integrity},
		"page size":             {`"page_bytes": 4096`, `"page_bytes": 4095`, problem.Integrity},
		"page size 0":           {`"page_bytes": 4096`, `"page_bytes": 0`, problem.Integrity},
		"negative":              {`"used_bytes": 163840`, `"used_bytes": -1`, problem.Integrity},
		"segment kind":          {`"kind": "raw"`, `"kind": "rare"`, problem.Integrity},
		"stats":                 {`"zero_pages": `, `"zero_pages": 9`, problem.Integrity},
		"hot outside":           {`"0:39+1`, `"0:39+2`, problem.Integrity},
		"hot overflow":          {`"0:39+1`, `"0:99999999999999999999+1`, problem.Integrity},
		"hot garbage":           {`"0:39+1`, `"0:39-1`, problem.Integrity},
		"hot empty item":        {`"0:39+1,`, `"0:39+1,,`, problem.Integrity},
		"checksum form":         {`"head_checksum": "xxh64:`, `"head_checksum": "crc32:`, problem.Integrity},
	} {
		t.Run(name, func(t *testing.T) {
			if !bytes.Contains(data, []byte(c.old)) {
				t.Fatalf("%s is not there", c.old)
			}
			changed := bytes.Replace(data, []byte(c.old), []byte(c.new), 1)
			if c.old != c.new {
				if _, err := DecodeManifest("x", changed); !problem.Is(err, problem.Integrity) {
					t.Errorf("with the old checksum: %v", err)
				}
			}
			seal(changed)
			_, err := DecodeManifest("x", changed)
			if c.code == "" && err != nil || c.code != "" && !problem.Is(err, c.code) {
				t.Errorf("got %v", err)
			}
			if c.code == problem.Refused && !strings.Contains(err.Error(), "from the future") {
				t.Errorf("got %v", err)
			}
		})
	}
	if _, err := DecodeManifest("x", append(bytes.Clone(data), ' ')); !problem.Is(err, problem.Integrity) {
		t.Errorf("trailing space: %v", err)
	}
	if _, err := DecodeManifest("x", make([]byte, MaxManifestBytes+1)); !problem.Is(err, problem.Integrity) {
		t.Errorf("too long: %v", err)
	}
}

func TestEncodeRefuses(t *testing.T) {
	for name, change := range map[string]func(m *Manifest){
		"no id":         func(m *Manifest) { m.ID = "" },
		"id with slash": func(m *Manifest) { m.ID = "a/b" },
		"own parent":    func(m *Manifest) { m.Parent = m.ID },
		"deep, orphan":  func(m *Manifest) { m.Depth = 1 },
		"too deep":      func(m *Manifest) { m.Parent, m.Depth = "p", MaxDepth+1 },
		"own owner":     func(m *Manifest) { m.Segments[0].Owner = m.ID },
		"VM, no owner":  func(m *Manifest) { m.Segments[0].VM = "b" },
		"pages":         func(m *Manifest) { m.Segments[0].Pages = m.Stats.Pages + 1 },
		"few tags": func(m *Manifest) {
			m.Tags = &TagsRef{FileRef: FileRef{Name: "tags"}, Scope: "x", Key: "0011223344556677"}
		},
		"no VM":          func(m *Manifest) { m.VM = "" },
		"not UTF-8":      func(m *Manifest) { m.Machine.Argv = []string{"\xff"} },
		"too long":       func(m *Manifest) { m.Machine.Argv = []string{strings.Repeat("x", MaxManifestBytes)} },
		"too many hot":   func(m *Manifest) { m.Hot = make(HotRuns, MaxHotRuns+1) },
		"facts collide":  func(m *Manifest) { m.Machine.Facts = map[string]string{"a": "1", "A": "2"} },
		"no blocks":      func(m *Manifest) { m.Blocks = nil },
		"from long ago":  func(m *Manifest) { m.CreatedAt = m.CreatedAt.AddDate(-100, 0, 0) },
		"mode with tabs": func(m *Manifest) { m.Mode = "a\tb" },
	} {
		m, _ := encoded(t)
		change(m)
		if _, err := EncodeManifest(m); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
