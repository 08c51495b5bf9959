package alg

import (
	"crypto/subtle"
	"errors"
)

// Keys of DES and triple DES that are refused.
var (
	// ErrWeakKey: one of the four weak or twelve semi-weak keys of DES (FIPS
	// 74), which undo themselves or each other.
	ErrWeakKey = errors.New("a weak key of DES")
	// ErrSingleDES: two equal keys side by side make triple DES plain DES
	// (RFC 2451, 2.3).
	ErrSingleDES = errors.New("a key of triple DES that is DES")
)

const desKeyLen = 8

// CheckKey refuses keys of the right length that do not protect; salt may
// follow. Only the DES family has such. The parity bits of DES keys are
// neither checked nor used.
func (e Encr) CheckKey(key []byte) error {
	switch e {
	case EncrDESCBC, Encr3DESCBC, EncrDESIV64, EncrDESIV32, Encr3DESIV64, Encr3DESIV32:
	default:
		return nil
	}
	for i := 0; i+desKeyLen <= len(key); i += desKeyLen {
		k := key[i : i+desKeyLen]
		for _, w := range weakKeys {
			if sameDES(k, []byte(w)) {
				return ErrWeakKey
			}
		}
		if i > 0 && sameDES(k, key[i-desKeyLen:i]) {
			return ErrSingleDES
		}
	}
	return nil
}

// sameDES compares without the parity bits.
func sameDES(a, b []byte) bool {
	var x [desKeyLen]byte
	subtle.XORBytes(x[:], a, b)
	d := byte(0)
	for _, v := range x {
		d |= v &^ 1
	}
	return d == 0
}

var weakKeys = [...]string{
	"\x01\x01\x01\x01\x01\x01\x01\x01", "\xfe\xfe\xfe\xfe\xfe\xfe\xfe\xfe",
	"\xe0\xe0\xe0\xe0\xf1\xf1\xf1\xf1", "\x1f\x1f\x1f\x1f\x0e\x0e\x0e\x0e",
	"\x01\x1f\x01\x1f\x01\x0e\x01\x0e", "\x1f\x01\x1f\x01\x0e\x01\x0e\x01",
	"\x01\xe0\x01\xe0\x01\xf1\x01\xf1", "\xe0\x01\xe0\x01\xf1\x01\xf1\x01",
	"\x01\xfe\x01\xfe\x01\xfe\x01\xfe", "\xfe\x01\xfe\x01\xfe\x01\xfe\x01",
	"\x1f\xe0\x1f\xe0\x0e\xf1\x0e\xf1", "\xe0\x1f\xe0\x1f\xf1\x0e\xf1\x0e",
	"\x1f\xfe\x1f\xfe\x0e\xfe\x0e\xfe", "\xfe\x1f\xfe\x1f\xfe\x0e\xfe\x0e",
	"\xe0\xfe\xe0\xfe\xf1\xfe\xf1\xfe", "\xfe\xe0\xfe\xe0\xfe\xf1\xfe\xf1",
}
