package packet

// Partial sums, for checksums over parts that lie apart: Sum or CopySum of each
// part on top of that of the one before, whose length is even, then Fold.

// PseudoSum begins the checksum of an upper-layer packet of protocol proto and
// n octets: the sum of the pseudo-header (RFC 768; RFC 8200, 8.1) by the
// addresses of the IP packet b, which has a whole header.
func PseudoSum(b []byte, proto uint8, n int) uint64 { return pseudo(b, proto, n) }

// Sum adds b to acc.
func Sum(b []byte, acc uint64) uint64 { return sum(b, acc) }

// CopySum is Sum of src, which it copies to dst on the way. dst has room for
// src and does not overlap it.
func CopySum(dst, src []byte, acc uint64) uint64 { return copySum(dst, src, acc) }

// Fold ends a sum. Its complement is the checksum; over a packet that contains
// its own correct checksum it is 0xffff.
func Fold(acc uint64) uint16 { return fold(acc) }
