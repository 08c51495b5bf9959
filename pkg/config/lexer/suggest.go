package lexer

import "strings"

// Suggest returns the known word that word was probably meant to be: equal but
// for case, or else the closest within two edits (insert, delete, replace,
// exchange of neighbours); "" if there is none. Short words need more likeness.
func Suggest(word string, known []string) string {
	best, dist := "", 3
	if len(word) > 64 {
		return ""
	}
	for _, k := range known {
		if strings.EqualFold(k, word) {
			return k
		}
		if d := edits(word, k); d < dist && d < max(len(word), len(k))-1 {
			best, dist = k, d
		}
	}
	return best
}

// edits is the optimal string alignment distance, 3 for anything larger than 2.
func edits(a, b string) int {
	if d := len(a) - len(b); d > 2 || d < -2 {
		return 3
	}
	before, prev, cur := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], before[j-2]+1)
			}
		}
		before, prev, cur = prev, cur, before
	}
	return prev[len(b)]
}
