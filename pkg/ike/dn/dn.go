// Package dn is about distinguished names (X.501; RFC 5280, 4.1.2.4 and 7.1):
// DER and the text of ike.conf, how they compare, and patterns of them. It knows
// nothing of certificates. For pkg/ike/cred, pkg/ike/pad and pkg/config/ikeconf.
package dn

import (
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/crypto/cryptobyte"
	der "golang.org/x/crypto/cryptobyte/asn1"
)

// Name is a distinguished name: a sequence of relative ones. The zero Name is
// empty. A Name is not changed once made.
type Name struct {
	rdns []rdn
}

// rdn is mostly one attribute; several are sorted, since their order means
// nothing.
type rdn []attribute

type attribute struct {
	oid   string // dotted
	value string // readable; "" if it is no string
	// norm is what is compared: lower case, blanks trimmed and single; other
	// types than strings by their DER behind a NUL.
	norm string
}

// types are the attributes that have a name, those of a row alike; the first
// name is the one that is written.
var types = []struct {
	oid   asn1.ObjectIdentifier
	names []string
	tag   der.Tag // of the string as we write it; 0: PrintableString, else UTF8String
}{
	{asn1.ObjectIdentifier{2, 5, 4, 6}, []string{"C"}, 0},
	{asn1.ObjectIdentifier{2, 5, 4, 8}, []string{"ST", "S", "SP"}, 0},
	{asn1.ObjectIdentifier{2, 5, 4, 7}, []string{"L"}, 0},
	{asn1.ObjectIdentifier{2, 5, 4, 9}, []string{"STREET"}, 0},
	{asn1.ObjectIdentifier{2, 5, 4, 10}, []string{"O"}, 0},
	{asn1.ObjectIdentifier{2, 5, 4, 11}, []string{"OU"}, 0},
	{asn1.ObjectIdentifier{2, 5, 4, 3}, []string{"CN"}, 0},
	{asn1.ObjectIdentifier{2, 5, 4, 4}, []string{"SN"}, 0},
	{asn1.ObjectIdentifier{2, 5, 4, 42}, []string{"GN"}, 0},
	{asn1.ObjectIdentifier{2, 5, 4, 5}, []string{"SERIALNUMBER"}, 0},
	{asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 1}, []string{"UID"}, 0},
	{asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 25}, []string{"DC"}, der.IA5String},
	{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 1}, []string{"E", "EMAIL", "EMAILADDRESS"}, der.IA5String},
	{asn1.ObjectIdentifier{2, 5, 4, 12}, []string{"T", "TITLE"}, 0},
	{asn1.ObjectIdentifier{2, 5, 4, 46}, []string{"DNQ"}, 0},
	{asn1.ObjectIdentifier{2, 5, 4, 43}, []string{"INITIALS"}, 0},
	{asn1.ObjectIdentifier{2, 5, 4, 17}, []string{"POSTALCODE"}, 0},
}

var byName, byOID = func() (map[string]int, map[string]int) {
	n, o := map[string]int{}, map[string]int{}
	for i, t := range types {
		o[t.oid.String()] = i
		for _, s := range t.names {
			n[s] = i
		}
	}
	return n, o
}()

var (
	errDER  = errors.New("not a distinguished name in DER")
	errText = errors.New("want ATTRIBUTE=value and so on")
)

// Parse reads a name in DER.
func Parse(b []byte) (Name, error) {
	var n Name
	in := cryptobyte.String(b)
	var seq cryptobyte.String
	if !in.ReadASN1(&seq, der.SEQUENCE) || !in.Empty() {
		return Name{}, errDER
	}
	for !seq.Empty() {
		var set cryptobyte.String
		if !seq.ReadASN1(&set, der.SET) || set.Empty() {
			return Name{}, errDER
		}
		var r rdn
		for !set.Empty() {
			var av, value cryptobyte.String
			var oid asn1.ObjectIdentifier
			var tag der.Tag
			if !set.ReadASN1(&av, der.SEQUENCE) || !av.ReadASN1ObjectIdentifier(&oid) {
				return Name{}, errDER
			}
			whole := av
			if !av.ReadAnyASN1(&value, &tag) || !av.Empty() {
				return Name{}, errDER
			}
			a := attribute{oid: oid.String()}
			if s, ok := text(tag, value); ok {
				a.value, a.norm = s, normal(s)
			} else {
				a.norm = "\x00" + string(whole)
			}
			r = append(r, a)
		}
		slices.SortFunc(r, func(a, b attribute) int {
			return strings.Compare(a.oid+"\x00"+a.norm, b.oid+"\x00"+b.norm)
		})
		n.rdns = append(n.rdns, r)
	}
	return n, nil
}

// text decodes a string type.
func text(tag der.Tag, b []byte) (string, bool) {
	switch tag {
	case der.UTF8String, der.PrintableString, der.IA5String, der.Tag(18): // NumericString
		return string(b), utf8.Valid(b)
	case der.T61String: // in practice Latin-1
		r := make([]rune, len(b))
		for i, c := range b {
			r[i] = rune(c)
		}
		return string(r), true
	case der.Tag(30): // BMPString
		if len(b)%2 != 0 {
			return "", false
		}
		u := make([]uint16, len(b)/2)
		for i := range u {
			u[i] = uint16(b[2*i])<<8 | uint16(b[2*i+1])
		}
		return string(utf16.Decode(u)), true
	}
	return "", false
}

// normal is a value as it is compared (RFC 5280, 7.1).
func normal(s string) string { return strings.ToLower(strings.Join(strings.Fields(s), " ")) }

// ParseText reads "C=US, O=Example\, Inc., CN=x", in the order of the
// certificate or the other way round. A backslash takes the meaning from a comma
// and from itself. A value of "*" makes a pattern.
func ParseText(s string) (Name, error) {
	var n Name
	for s != "" {
		var field strings.Builder
		i := 0
		for ; i < len(s) && s[i] != ','; i++ {
			if s[i] == '\\' && i+1 < len(s) && (s[i+1] == ',' || s[i+1] == '\\') {
				i++
			}
			field.WriteByte(s[i])
		}
		if i+1 == len(s) { // ends in a comma
			return Name{}, errText
		}
		s = s[min(i+1, len(s)):]
		name, value, found := strings.Cut(field.String(), "=")
		t, known := byName[strings.ToUpper(strings.TrimSpace(name))]
		if value = strings.TrimSpace(value); !found || !known || value == "" || !utf8.ValidString(value) {
			return Name{}, errText
		}
		n.rdns = append(n.rdns, rdn{{types[t].oid.String(), value, normal(value)}})
	}
	if len(n.rdns) == 0 {
		return Name{}, errText
	}
	return n, nil
}

// IsZero reports whether n has no attribute.
func (n Name) IsZero() bool { return len(n.rdns) == 0 }

// IsPattern reports whether n matches more than one name.
func (n Name) IsPattern() bool {
	for _, r := range n.rdns {
		for _, a := range r {
			if a.value == "*" {
				return true
			}
		}
	}
	return false
}

// Equal reports whether both are the same name: attributes in the same order
// with equal values, in which neither case nor surplus blanks nor the kind of
// string count.
func (n Name) Equal(m Name) bool {
	return slices.EqualFunc(n.rdns, m.rdns, func(r, q rdn) bool {
		return slices.EqualFunc(r, q, func(a, b attribute) bool { return a.oid == b.oid && a.norm == b.norm })
	})
}

// Match reports whether m is what n, which comes from ParseText, describes: the
// same attributes with equal values, "*" for any value, in the same order or in
// the opposite one.
func (n Name) Match(m Name) bool {
	if len(n.rdns) != len(m.rdns) || n.IsZero() {
		return false
	}
	same := func(r, q rdn) bool {
		return slices.EqualFunc(r, q, func(a, b attribute) bool {
			return a.oid == b.oid && (a.value == "*" || a.norm == b.norm)
		})
	}
	if slices.EqualFunc(n.rdns, m.rdns, same) {
		return true
	}
	back := slices.Clone(m.rdns)
	slices.Reverse(back)
	return slices.EqualFunc(n.rdns, back, same)
}

// DER writes a name that comes from ParseText, in its order: PrintableString
// where that can hold the value, else UTF8String.
func (n Name) DER() ([]byte, error) {
	var b cryptobyte.Builder
	b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
		for _, r := range n.rdns {
			b.AddASN1(der.SET, func(b *cryptobyte.Builder) {
				for _, a := range r {
					b.AddASN1(der.SEQUENCE, func(b *cryptobyte.Builder) {
						i, ok := byOID[a.oid]
						if !ok || a.value == "" {
							b.SetError(fmt.Errorf("attribute %s cannot be written", a.oid))
							return
						}
						b.AddASN1ObjectIdentifier(types[i].oid)
						b.AddASN1(tagOf(i, a.value), func(b *cryptobyte.Builder) { b.AddBytes([]byte(a.value)) })
					})
				}
			})
		}
	})
	return b.Bytes()
}

func tagOf(i int, v string) der.Tag {
	printable, ascii := true, true
	for _, c := range v {
		ascii = ascii && c < utf8.RuneSelf
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		printable = printable && (letter || strings.ContainsRune(" '()+,-./:=?", c))
	}
	switch {
	case types[i].tag != 0 && ascii:
		return types[i].tag
	case printable:
		return der.PrintableString
	}
	return der.UTF8String
}

// String gives a name as it is written in ike.conf, as far as that can be.
func (n Name) String() string {
	var l []string
	for _, r := range n.rdns {
		var as []string
		for _, a := range r {
			as = append(as, a.String())
		}
		l = append(l, strings.Join(as, " + "))
	}
	return strings.Join(l, ", ")
}

func (a attribute) String() string {
	name := a.oid
	if i, ok := byOID[a.oid]; ok {
		name = types[i].names[0]
	}
	if raw, ok := strings.CutPrefix(a.norm, "\x00"); ok {
		return name + "=#" + hex.EncodeToString([]byte(raw))
	}
	var b strings.Builder
	for _, c := range a.value {
		switch {
		case c == ',' || c == '\\':
			b.WriteRune('\\')
			b.WriteRune(c)
		case !unicode.IsPrint(c): // nothing of a stranger's breaks a line of the log
			fmt.Fprintf(&b, "\\u%04x", c)
		default:
			b.WriteRune(c)
		}
	}
	return name + "=" + b.String()
}
