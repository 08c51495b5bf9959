package dn

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"strings"
	"testing"
)

func text1(t *testing.T, s string) Name {
	t.Helper()
	n, err := ParseText(s)
	if err != nil {
		t.Fatalf("%q: %v", s, err)
	}
	return n
}

func TestMatch(t *testing.T) {
	for _, tt := range []struct {
		pattern, name string
		want          bool
	}{
		{"C=US, O=Example, CN=x", "C=US, O=Example, CN=x", true},
		{"C=us,O=  exAMPLE  corp, CN=X", "C=US, O=Example Corp, CN=x", true},
		{"CN=x, O=Example, C=US", "C=US, O=Example, CN=x", true},
		{"C=US, O=Example, CN=*", "C=US, O=Example, CN=anybody at all", true},
		{"C=US, O=Example, CN=*", "C=US, O=Example", false},
		{"C=US, O=Example", "C=US, O=Example, CN=x", false},
		{"C=US, CN=x, O=Example", "C=US, O=Example, CN=x", false},
		{"C=US, O=Exam*, CN=x", "C=US, O=Example, CN=x", false},
		{"O=A\\, B, CN=\\\\", "O=a\\, b, CN=\\\\", true},
		{"E=a@example.com", "EMAILADDRESS=a@EXAMPLE.com", true},
		{"CN=*, O=*", "O=x, CN=y", true},
	} {
		p, n := text1(t, tt.pattern), text1(t, tt.name)
		b, err := n.DER()
		if err != nil {
			t.Fatal(err)
		}
		m, err := Parse(b)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if got := p.Match(m); got != tt.want {
			t.Errorf("%s matches %s: got %v, want %v", tt.pattern, tt.name, got, tt.want)
		}
		if m.String() != n.String() || !m.Equal(n) {
			t.Errorf("%s: through DER it is %s", n, m)
		}
	}
	for _, bad := range []string{"", "CN", "CN=", "=x", "XX=y", "CN=x,", "CN=x,,O=y", "CN=\xff"} {
		if n, err := ParseText(bad); err == nil {
			t.Errorf("%q: got %v, want an error", bad, n)
		}
	}
}

// Other kinds of string are the same name; other structures are not.
func TestEncodings(t *testing.T) {
	want := text1(t, "O=Zürich AG, CN=x")
	raw := func(parts ...string) []byte {
		t.Helper()
		b, err := hex.DecodeString(strings.Join(parts, ""))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	const cnUTF8, cnPrintable = "310a3008" + "0603550403" + "0c0178", "310a3008" + "0603550403" + "130178"
	der, err := want.DER()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(hex.EncodeToString(der), cnPrintable) {
		t.Errorf("DER %x: CN is no PrintableString", der)
	}
	other, err := Parse(raw("301d", "310f"+"300d"+"060355040a"+"1406"+hex.EncodeToString([]byte("Z\xfcrich"))+cnUTF8))
	if err != nil || !other.Equal(text1(t, "O=ZÜRICH, CN=X")) {
		t.Errorf("T61String: %v, %v", other, err)
	}
	bmp, err := Parse(raw("300d" + "310b3009" + "0603550403" + "1e020078"))
	if err != nil || !bmp.Equal(text1(t, "CN=x")) {
		t.Errorf("BMPString: %v, %v", bmp, err)
	}
	// Two attributes in one relative name are not two relative names.
	multi, err := asn1.Marshal(pkix.RDNSequence{{{Type: asn1.ObjectIdentifier{2, 5, 4, 10}, Value: "o"}, {Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: "x"}}})
	if err != nil {
		t.Fatal(err)
	}
	m, err := Parse(multi)
	if err != nil || text1(t, "O=o, CN=x").Match(m) || m.String() != "O=o + CN=x" && m.String() != "CN=x + O=o" {
		t.Errorf("multi-valued: %v, %v", m, err)
	}
	// What is no string is compared by its octets, and nothing breaks a line.
	octets, err := Parse(raw("300d" + "310b3009" + "0603550403" + "04020a78"))
	if err != nil || octets.String() != "CN=#04020a78" || octets.Equal(text1(t, "CN=x")) {
		t.Errorf("octets: %v, %v", octets, err)
	}
	lines, err := Parse(raw("300e" + "310c300a" + "0603550403" + "0c03610a62"))
	if err != nil || lines.String() != `CN=a\u000ab` {
		t.Errorf("control characters: %v, %v", lines, err)
	}
}

func TestHostile(t *testing.T) {
	b, err := text1(t, "C=US, O=Example, CN=x").DER()
	if err != nil {
		t.Fatal(err)
	}
	for i := range b {
		if n, err := Parse(b[:i]); err == nil {
			t.Errorf("cut to %d octets: %v", i, n)
		}
	}
	if n, err := Parse(append(b, 0)); err == nil {
		t.Errorf("with an octet behind: %v", n)
	}
	if n, err := Parse([]byte{0x30, 0}); err != nil || !n.IsZero() || text1(t, "CN=*").Match(n) {
		t.Errorf("empty: %v, %v", n, err)
	}
}

// FuzzParse: nothing panics; a name equals itself, and what can be written is
// read again as the same.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"C=US, O=Example, CN=x", "E=a@b, DC=c, CN=\\,ü"} {
		n, err := ParseText(s)
		if err != nil {
			f.Fatal(err)
		}
		b, err := n.DER()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, s)
	}
	f.Fuzz(func(t *testing.T, b []byte, s string) {
		if n, err := Parse(b); err == nil {
			if !n.Equal(n) || strings.ContainsAny(n.String(), "\n\r\x00") {
				t.Errorf("%x: %q", b, n)
			}
		}
		n, err := ParseText(s)
		if err != nil {
			return
		}
		d, err := n.DER()
		if err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		m, err := Parse(d)
		if err != nil || !m.Equal(n) || !n.Match(m) {
			t.Errorf("%q: through DER %v, %v", s, m, err)
		}
	})
}
