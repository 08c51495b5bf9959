// Package stat computes what the benchmark says about its samples: medians,
// spread, ratios of interleaved runs, and the search for the highest rate that
// a path carries.
package stat

import (
	"math"
	"slices"
)

// Quantile returns the q-quantile (0 to 1) of samples in any order, between
// two of them where it falls there; NaN when there are none.
func Quantile(samples []float64, q float64) float64 {
	if len(samples) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(samples))
	at := q * float64(len(s)-1)
	i := min(int(at), len(s)-1)
	if i == len(s)-1 {
		return s[i]
	}
	return s[i] + (at-float64(i))*(s[i+1]-s[i])
}

// Summary is a median with the range of the samples behind it.
type Summary struct {
	N                int
	Median, Min, Max float64
}

// Summarize returns the summary of samples; all NaN when there are none.
func Summarize(samples []float64) Summary {
	return Summary{len(samples), Quantile(samples, 0.5), Quantile(samples, 0), Quantile(samples, 1)}
}

// Ratios divides the samples of a by those of b round by round, so that what
// changed the machine between rounds changes both. Rounds that only one has,
// and those in which b is 0, are left out.
func Ratios(a, b map[int]float64) []float64 {
	var out []float64
	rounds := make([]int, 0, len(a))
	for r := range a {
		rounds = append(rounds, r)
	}
	slices.Sort(rounds)
	for _, r := range rounds {
		if d, ok := b[r]; ok && d != 0 {
			out = append(out, a[r]/d)
		}
	}
	return out
}
