// Package report turns measurements into what people read: medians, a Markdown
// table with ratios and goals, a table of ratios for machines to compare, and
// small SVG pictures. It measures nothing and does no I/O.
//
// # Concurrency and failure
//
// Nothing here is shared between goroutines. A figure that was not measured is
// absent (NaN), never zero: it prints as a dash and meets no goal.
package report
