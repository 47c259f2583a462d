package main

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"

	"github.com/ckagent/ckagent/agent/problem"
)

// interrupted is the one line that an interrupt ends with. Whatever was under way
// fails by it; those failures are no news. What failed on its own, such as putting
// something back, is.
func interrupted(verb string, err error) error {
	var news []string
	for _, e := range parts(err) {
		if errors.Is(e, context.Canceled) || errors.Is(e, os.ErrDeadlineExceeded) {
			continue
		}
		if text := oneLine(e.Error()); !slices.Contains(news, text) {
			news = append(news, text)
		}
	}
	if len(news) == 0 {
		return problem.New(problem.Cancelled, verb, "", "interrupted")
	}
	return problem.New(problem.Cancelled, verb, "", "interrupted; besides: %s", strings.Join(news, "; "))
}

// parts takes joined errors apart, and leaves wrapped ones together.
func parts(err error) []error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok || !strings.Contains(err.Error(), "\n") { // several %w are one sentence
		return []error{err}
	}
	var out []error
	for _, e := range joined.Unwrap() {
		out = append(out, parts(e)...)
	}
	return out
}

// oneLine writes joined errors as one.
func oneLine(text string) string {
	return strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' }), "; ")
}
