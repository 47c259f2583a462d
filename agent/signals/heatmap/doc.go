// Package heatmap draws where memory is written: as blocks on a terminal and as a
// PNG picture. It is pure: values in, text or pixels out.
//
// Both show memory block after block, each from its first byte on, left to right
// and then downwards; the warmer a cell the more often it was written, on a
// logarithmic scale, since the hottest region is easily a thousand times hotter
// than what is still worth seeing.
package heatmap
