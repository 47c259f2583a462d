package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

// TestUsageErrorsInTheFormAskedFor: scripts that ask for JSON get it for their own
// mistakes too, wherever the flag stands.
func TestUsageErrorsInTheFormAskedFor(t *testing.T) {
	for _, args := range [][]string{
		{"ls", "--bogus", "--json"},
		{"--json", "ls", "--bogus"},
		{"nonsense", "--json"},
		{"inspect", "--json"},
	} {
		var out, errs bytes.Buffer
		if code := run(t.Context(), args, &out, &errs); code != 2 {
			t.Errorf("%q: exit code %d", args, code)
		}
		var answer struct {
			Schema string
			Error  struct {
				Code    string
				Message string
			}
		}
		if err := json.Unmarshal(out.Bytes(), &answer); err != nil || answer.Error.Code != "usage" || answer.Schema == "" {
			t.Errorf("%q: %q, %v", args, out.String(), err)
		}
		if errs.Len() > 0 {
			t.Errorf("%q: also printed %q", args, errs.String())
		}
	}
	var out, errs bytes.Buffer
	if code := run(t.Context(), []string{"ls", "--bogus", "--", "--json"}, &out, &errs); code != 2 || out.Len() > 0 || !strings.Contains(errs.String(), "bogus") {
		t.Errorf("exit code %d, %q, %q", code, out.String(), errs.String())
	}
}
