// Package pfkey is the wire format of PF_KEYv2: RFC 2367 and the extensions
// that Linux and KAME share.
package pfkey
