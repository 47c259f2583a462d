// Package estimate turns observations of memory being written into the figures
// that policies decide by: rates with honest error bars, the dirty-rate curve, the
// make-up of what is written. It is arithmetic only and does no I/O.
//
// # Words
//
// The dirty rate at interval T is the number of distinct pages written within T,
// divided by T. It falls as T grows, because pages are written again: G(T), the
// distinct pages written within T, is the curve, and G(T) = W(1-exp(-T/tau)) the
// model fitted to it, W being what is rewritten in the long run (the write working
// set) and W/tau the rate at which a page is written for the first time just after
// an arm.
//
// # The sampled estimate
//
// Memory is cut into units of a few pages. Of them a random sample is armed for a
// window; the number of pages written in each sampled unit is observed. Units are
// drawn within classes of similar expected heat, as learned from former windows, and
// within a class one of each of as many equal stretches of addresses: what a guest
// writes comes in runs, and a sample that is spread evenly meets a run in proportion
// to its length. Whatever was learned, wrong or right, and whatever pattern the load
// has, the estimate stays unbiased, since units are drawn anew within each stretch;
// good knowledge only narrows the error bar. The number drawn follows from the
// precision wanted (Neyman allocation), bounded by what the caller allows.
//
// The error bar is half the width of the 95 % confidence interval: Student's t
// with Satterthwaite's degrees of freedom on the variance between neighbours in each
// class's sample (successive differences; Wolter, Introduction to Variance
// Estimation, chapter 8), with finite population correction, so that it vanishes
// where everything is armed. The ends of runs are told from chance, as their variance
// is a third of what the differences say. A class in which nothing was seen is given the variance of one more unit that was.
//
// # Concurrency
//
// Values of this package have one owner at a time.
package estimate
