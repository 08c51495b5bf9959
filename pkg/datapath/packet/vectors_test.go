//go:build amd64 && !purego

package packet

import "testing"

// TestSumWithout: the sums are right without vectors too.
func TestSumWithout(t *testing.T) {
	defer func(v bool) { haveVectors = v }(haveVectors)
	haveVectors = false
	TestSum(t)
}
