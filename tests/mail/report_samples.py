"""Reports: the examples of the standards, and the shapes that large mail servers send.

The examples of RFC 3464, 5965, 6533, 6591, 8098 and 8460 are those of their texts. The others have
the shape of what each program sends, with names of our own.
"""

from __future__ import annotations

import gzip
import json
from base64 import encodebytes
from typing import Any, Final


def mail(text: str) -> bytes:
    return text.lstrip("\n").replace("\n", "\r\n").encode()


DSN: Final = mail("""
Date: Thu, 7 Jul 1994 17:16:05 -0400
From: Mail Delivery Subsystem <MAILER-DAEMON@CS.UTK.EDU>
Message-Id: <199407072116.RAA14128@CS.UTK.EDU>
Subject: Returned mail: Cannot send message for 5 days
To: <owner-info-mime@cs.utk.edu>
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status;
      boundary="RAA14128.773615765/CS.UTK.EDU"

--RAA14128.773615765/CS.UTK.EDU

The original message was received at Sat, 2 Jul 1994 17:10:28 -0400
from root@localhost

   ----- The following addresses had delivery problems -----
<louisl@larry.slip.umd.edu>  (unrecoverable error)

----- Transcript of session follows -----
<louisl@larry.slip.umd.edu>... Deferred: Connection timed out
      with larry.slip.umd.edu.
Message could not be delivered for 5 days
Message will be deleted from queue

--RAA14128.773615765/CS.UTK.EDU
content-type: message/delivery-status

Reporting-MTA: dns; cs.utk.edu

Original-Recipient: rfc822;louisl@larry.slip.umd.edu
Final-Recipient: rfc822;louisl@larry.slip.umd.edu
Action: failed
Status: 4.0.0
Diagnostic-Code: smtp; 426 connection timed out
Last-Attempt-Date: Thu, 7 Jul 1994 17:15:49 -0400

--RAA14128.773615765/CS.UTK.EDU
content-type: message/rfc822

[original message goes here]

--RAA14128.773615765/CS.UTK.EDU--
""")
"""RFC 3464, appendix E.1."""

DSN_OF_SEVERAL: Final = mail("""
Date: Fri, 8 Jul 1994 09:21:47 -0400
From: Mail Delivery Subsystem <MAILER-DAEMON@CS.UTK.EDU>
Subject: Returned mail: User unknown
To: <owner-ups-mib@CS.UTK.EDU>
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status;
      boundary="JAA13167.773673707/CS.UTK.EDU"

--JAA13167.773673707/CS.UTK.EDU
content-type: text/plain; charset=us-ascii

   ----- The following addresses had delivery problems -----
<arathib@vnet.ibm.com>  (unrecoverable error)
<wsnell@sdcc13.ucsd.edu>  (unrecoverable error)

--JAA13167.773673707/CS.UTK.EDU
content-type: message/delivery-status

Reporting-MTA: dns; cs.utk.edu

Original-Recipient: rfc822;arathib@vnet.ibm.com
Final-Recipient: rfc822;arathib@vnet.ibm.com
Action: failed
Status: 5.0.0 (permanent failure)
Diagnostic-Code: smtp;
 550 'arathib@vnet.IBM.COM' is not a registered gateway user
Remote-MTA: dns; vnet.ibm.com

Original-Recipient: rfc822;johnh@hpnjld.njd.hp.com
Final-Recipient: rfc822;johnh@hpnjld.njd.hp.com
Action: delayed
Status: 4.0.0 (hpnjld.njd.jp.com: host name lookup failure)

Original-Recipient: rfc822;wsnell@sdcc13.ucsd.edu
Final-Recipient: rfc822;wsnell@sdcc13.ucsd.edu
Action: failed
Status: 5.0.0
Diagnostic-Code: smtp; 550 user unknown
Remote-MTA: dns; sdcc13.ucsd.edu

--JAA13167.773673707/CS.UTK.EDU
content-type: message/rfc822

[original message goes here]
--JAA13167.773673707/CS.UTK.EDU--
""")
"""RFC 3464, appendix E.2."""

DSN_OF_GATEWAY: Final = mail("""
Disclose-recipients: prohibited
Date: Fri, 08 Jul 1994 09:21:25 -0400 (EDT)
From: Message Router Submission Agent <AMMGR@corp.timeplex.com>
Subject: Status of: Re: Battery current sense
To: owner-ups-mib@CS.UTK.EDU
Message-id: <01HEGJ0WNBY28Y95LN@mr.timeplex.com>
MIME-version: 1.0
content-type: multipart/report;
       report-type=delivery-status;
       boundary="84229080704991.122306.SYS30"

--84229080704991.122306.SYS30
content-type: text/plain

Invalid address - nair_s
%DIR-E-NODIRMTCH, No matching Directory Entry found

--84229080704991.122306.SYS30
content-type: message/delivery-status

Reporting-MTA: mailbus; SYS30

Final-Recipient: unknown; nair_s
Status: 5.0.0 (unknown permanent failure)
Action: failed

--84229080704991.122306.SYS30--
""")
"""RFC 3464, appendix E.3."""

DSN_DELAYED: Final = mail("""
From: <postmaster@nsfnet-relay.ac.uk>
Message-Id: <199407092338.TAA23293@CS.UTK.EDU>
Received: from nsfnet-relay.ac.uk by sun2.nsfnet-relay.ac.uk
      id <g.12954-0@sun2.nsfnet-relay.ac.uk>;
      Sun, 10 Jul 1994 00:36:51 +0100
To: owner-info-mime@cs.utk.edu
Date: Sun, 10 Jul 1994 00:36:51 +0100
Subject: WARNING: message delayed at "nsfnet-relay.ac.uk"
content-type: multipart/report; report-type=delivery-status;
       boundary=foobar

--foobar
content-type: text/plain

The following message has been delayed.

--foobar
content-type: message/delivery-status

Reporting-MTA: dns; sun2.nsfnet-relay.ac.uk

Final-Recipient: rfc822;thomas@de-montfort.ac.uk
Status: 4.0.0 (unknown temporary failure)
Action: delayed

--foobar
content-type: message/rfc822

[returned message goes here]
--foobar--
""")
"""RFC 3464, appendix E.4."""

COMPLAINT: Final = mail("""
From: <abusedesk@example.com>
Date: Thu, 8 Mar 2005 17:40:36 EDT
Subject: FW: Earn money
To: <abuse@example.net>
MIME-Version: 1.0
Content-Type: multipart/report; report-type=feedback-report;
     boundary="part1_13d.2e68ed54_boundary"

--part1_13d.2e68ed54_boundary
Content-Type: text/plain; charset="US-ASCII"
Content-Transfer-Encoding: 7bit

This is an email abuse report for an email message received from IP
192.0.2.1 on Thu, 8 Mar 2005 14:00:00 EDT.  For more information
about this format please see http://www.mipassoc.org/arf/.

--part1_13d.2e68ed54_boundary
Content-Type: message/feedback-report

Feedback-Type: abuse
User-Agent: SomeGenerator/1.0
Version: 1
Original-Mail-From: <somespammer@example.net>
Original-Rcpt-To: <user@example.com>
Arrival-Date: Thu, 8 Mar 2005 14:00:00 EDT
Reporting-MTA: dns; mail.example.com
Source-IP: 192.0.2.1
Authentication-Results: mail.example.com;
               spf=fail smtp.mail=somespammer@example.com
Reported-Domain: example.net
Reported-Uri: http://example.net/earn_money.html
Reported-Uri: mailto:user@example.com
Removal-Recipient: user@example.com

--part1_13d.2e68ed54_boundary
Content-Type: message/rfc822
Content-Disposition: inline

From: <somespammer@example.net>
Received: from mailserver.example.net (mailserver.example.net
     [192.0.2.1]) by example.com with ESMTP id M63d4137594e46;
     Thu, 08 Mar 2005 14:00:00 -0400
To: <Undisclosed Recipients>
Subject: Earn money
MIME-Version: 1.0
Content-type: text/plain
Message-ID: 8787KJKJ3K4J3K4J3K4J3.mail@example.net
Date: Thu, 02 Sep 2004 12:31:03 -0500

Spam Spam Spam
Spam Spam Spam
--part1_13d.2e68ed54_boundary--
""")
"""RFC 5965, appendix B.2."""

AUTH_FAILURE: Final = mail("""
Message-ID: <433689.81121.example@mta.mail.receiver.example>
From: "SomeISP Antispam Feedback" <feedback@mail.receiver.example>
To: arf-failure@sender.example
Subject: FW: You have a new bill from your bank
Date: Sat, 8 Oct 2011 15:15:59 -0500 (CDT)
MIME-Version: 1.0
Content-Type: multipart/report;
  boundary="------------Boundary-00=_3BCR4Y7kX93yP9uUPRhg";
  report-type=feedback-report
Content-Transfer-Encoding: 7bit

--------------Boundary-00=_3BCR4Y7kX93yP9uUPRhg
Content-Type: text/plain; charset="us-ascii"
Content-Disposition: inline
Content-Transfer-Encoding: 7bit

This is an authentication failure report for an email message
received from a.sender.example on 8 Oct 2011 20:15:58 +0000 (GMT).

--------------Boundary-00=_3BCR4Y7kX93yP9uUPRhg
Content-Type: message/feedback-report
Content-Transfer-Encoding: 7bit

Feedback-Type: auth-failure
User-Agent: Someisp!Mail-Feedback/1.0
Version: 1
Original-Mail-From: anexample.reply@a.sender.example
Original-Envelope-Id: o3F52gxO029144
Authentication-Results: mta1011.mail.tp2.receiver.example;
 dkim=fail (bodyhash) header.d=sender.example
Auth-Failure: bodyhash
DKIM-Canonicalized-Body: VGhpcyBpcyBhIG1lc3NhZ2UgYm9keSB0
 aGF0IGdvdCBtb2RpZmllZCBpbiB0cmFuc2l0LgoKQXQgdGhl
DKIM-Domain: sender.example
DKIM-Identity: @sender.example
DKIM-Selector: testkey
Arrival-Date: 8 Oct 2011 20:15:58 +0000 (GMT)
Source-IP: 192.0.2.1
Reported-Domain: a.sender.example
Reported-URI: http://www.sender.example/

--------------Boundary-00=_3BCR4Y7kX93yP9uUPRhg
Content-Type: text/rfc822-headers
Content-Transfer-Encoding: 7bit

Authentication-Results: mta1011.mail.tp2.receiver.example;
 dkim=fail (bodyhash) header.d=sender.example
From: "Sender" <anexample.reply@a.sender.example>
To: someuser@receiver.example
Subject: You have a new bill from your bank
Message-ID: <20111008201558@a.sender.example>

--------------Boundary-00=_3BCR4Y7kX93yP9uUPRhg--
""")
"""RFC 6591, appendix B.1, shortened."""

DISPOSITION: Final = mail("""
Date: Wed, 20 Sep 1995 00:19:00 (EDT) -0400
From: Joe Recipient <Joe_Recipient@example.com>
Message-Id: <199509200019.12345@example.com>
Subject: Re: First draft of report
To: Jane Sender <Jane_Sender@example.org>
MIME-Version: 1.0
Content-Type: multipart/report;
   report-type=disposition-notification;
   boundary="RAA14128.773615765/example.com"

--RAA14128.773615765/example.com

The message sent on 1995 Sep 19 at 13:30:00 (EDT) -0400 to Joe
Recipient <Joe_Recipient@example.com> with subject "First draft of
report" has been displayed.

--RAA14128.773615765/example.com
Content-Type: message/disposition-notification

Reporting-UA: joes-pc.cs.example.com; Foomail 97.1
Original-Recipient: rfc822;Joe_Recipient@example.com
Final-Recipient: rfc822;Joe_Recipient@example.com
Original-Message-ID: <199509192301.23456@example.org>
Disposition: manual-action/MDN-sent-manually; displayed

--RAA14128.773615765/example.com
Content-Type: message/rfc822

[original message optionally goes here]

--RAA14128.773615765/example.com--
""")
"""RFC 8098, section 9."""

DSN_UTF8: Final = mail("""
From: postmaster@example.org
Subject: Undelivered
MIME-Version: 1.0
Content-Type: multipart/report; report-type=global-delivery-status; boundary=b

--b
Content-Type: text/plain; charset=utf-8

gescheitert

--b
Content-Type: message/global-delivery-status; charset=utf-8
Content-Transfer-Encoding: 8bit

Reporting-MTA: dns; mx.example.org

Original-Recipient: utf-8; b\\x{FC}cher@example.org
Final-Recipient: utf-8;bücher@example.org
Action: failed
Status: 5.1.1
Diagnostic-Code: smtp; 550 5.1.1 gibt es nicht

--b
Content-Type: message/global-headers

Message-ID: <größe@b.test>

--b--
""")
"""A report with the parts of RFC 6533."""

TLS: Final[dict[str, Any]] = {
    "organization-name": "Company-X",
    "date-range": {
        "start-datetime": "2016-04-01T00:00:00Z",
        "end-datetime": "2016-04-01T23:59:59Z",
    },
    "contact-info": "sts-reporting@company-x.example",
    "report-id": "5065427c-23d3-47ca-b6e0-946ea0e8c4be",
    "policies": [
        {
            "policy": {
                "policy-type": "sts",
                "policy-string": [
                    "version: STSv1",
                    "mode: testing",
                    "mx: *.mail.company-y.example",
                    "max_age: 86400",
                ],
                "policy-domain": "company-y.example",
                "mx-host": "*.mail.company-y.example",
            },
            "summary": {
                "total-successful-session-count": 5326,
                "total-failure-session-count": 303,
            },
            "failure-details": [
                {
                    "result-type": "certificate-expired",
                    "sending-mta-ip": "2001:db8:abcd:0012::1",
                    "receiving-mx-hostname": "mx1.mail.company-y.example",
                    "failed-session-count": 100,
                },
                {
                    "result-type": "starttls-not-supported",
                    "sending-mta-ip": "2001:db8:abcd:0013::1",
                    "receiving-mx-hostname": "mx2.mail.company-y.example",
                    "receiving-ip": "203.0.113.56",
                    "failed-session-count": 200,
                    "additional-information": "https://reports.company-x.example/"
                    "report_info ? id = 5065427 c - 23 d3# StarttlsNotSupported ",
                },
                {
                    "result-type": "validation-failure",
                    "sending-mta-ip": "198.51.100.62",
                    "receiving-ip": "203.0.113.58",
                    "receiving-mx-hostname": "mx-backup.mail.company-y.example",
                    "failed-session-count": 3,
                    "failure-reason-code": "X509_V_ERR_PROXY_PATH_LENGTH_EXCEEDED",
                },
            ],
        }
    ],
}
"""RFC 8460, appendix B."""


def tls_mail(document: Any = None, *, packed: bytes | None = None) -> bytes:
    """A TLS report as section 5.3 of RFC 8460 has it."""
    data = json.dumps(TLS if document is None else document).encode()
    packed = gzip.compress(data) if packed is None else packed
    return (
        mail("""
From: tlsrpt@mail.sender.example.com
Date: Fri, May 09 2017 16:54:30 -0800
To: mts-sts-tlsrpt@example.net
Subject: Report Domain: example.net
 Submitter: mail.sender.example.com
 Report-ID: <735ff.e317+bf22029@example.net>
TLS-Report-Domain: example.net
TLS-Report-Submitter: mail.sender.example.com
MIME-Version: 1.0
Content-Type: multipart/report; report-type="tlsrpt";
 boundary="----=_NextPart_000_024E_01CC9B0A.AFE54C00"
Content-Language: en-us

This is a multipart message in MIME format.

------=_NextPart_000_024E_01CC9B0A.AFE54C00
Content-Type: text/plain; charset="us-ascii"
Content-Transfer-Encoding: 7bit

This is an aggregate TLS report from mail.sender.example.com

------=_NextPart_000_024E_01CC9B0A.AFE54C00
Content-Type: application/tlsrpt+gzip
Content-Transfer-Encoding: base64
Content-Disposition: attachment;
 filename="mail.sender.example!example.com!1013662812!1013749130.json.gz"

""")
        + encodebytes(packed).replace(b"\n", b"\r\n")
        + b"\r\n------=_NextPart_000_024E_01CC9B0A.AFE54C00--\r\n"
    )


DMARC: Final = mail("""
From: noreply-dmarc-support@provider.test
To: dmarc@list.test
Subject: Report domain: list.test Submitter: provider.test Report-ID: 1234567890
MIME-Version: 1.0
Content-Type: application/zip;
 name="provider.test!list.test!1750000000!1750086399.zip"
Content-Disposition: attachment;
 filename="provider.test!list.test!1750000000!1750086399.zip"
Content-Transfer-Encoding: base64

UEsDBAoAAAAIAA==
""")

DMARC_CONTINUED: Final = mail("""
From: postmaster@provider.test
Subject: [Preview] Report Domain: list.test Submitter: provider.test Report-ID: <x@provider.test>
Content-Type: multipart/mixed; boundary=m

--m
Content-Type: text/plain

See the file.
--m
Content-Type: application/gzip;
 name*0*=us-ascii'en'provider.test%21list.test%21;
 name*1="1750000000!1750086399!7.xml.gz"
Content-Transfer-Encoding: base64

H4sI
--m--
""")
"""A name in the parts of RFC 2231."""

POSTFIX: Final = mail("""
Return-Path: <>
Date: Mon, 16 Jun 2025 10:00:05 +0200 (CEST)
From: MAILER-DAEMON@mx.example.org (Mail Delivery System)
Subject: Undelivered Mail Returned to Sender
To: news@list.test
Auto-Submitted: auto-replied
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status;
\tboundary="4BC12345.1750060805/mx.example.org"
Content-Transfer-Encoding: 8bit
Message-Id: <20250616080005.4BC12346@mx.example.org>

This is a MIME-encapsulated message.

--4BC12345.1750060805/mx.example.org
Content-Description: Notification
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

This is the mail system at host mx.example.org.

<ann@example.org>: host mail.example.org[192.0.2.7] said: 550 5.1.1
    <ann@example.org>: Recipient address rejected: User unknown (in reply to
    RCPT TO command)

--4BC12345.1750060805/mx.example.org
Content-Description: Delivery report
Content-Type: message/delivery-status

Reporting-MTA: dns; mx.example.org
Original-Envelope-Id: campaign-77
X-Postfix-Queue-ID: 4BC12345
X-Postfix-Sender: rfc822; news@list.test
Arrival-Date: Mon, 16 Jun 2025 10:00:04 +0200 (CEST)

Final-Recipient: rfc822; ann@example.org
Original-Recipient: rfc822;Ann@example.org
Action: failed
Status: 5.1.1
Remote-MTA: dns; mail.example.org
Diagnostic-Code: smtp; 550 5.1.1 <ann@example.org>: Recipient address rejected:
    User unknown

--4BC12345.1750060805/mx.example.org
Content-Description: Undelivered Message Headers
Content-Type: text/rfc822-headers
Content-Transfer-Encoding: 8bit

Return-Path: <news@list.test>
Received: from mq.list.test (mq.list.test [192.0.2.1])
\tby mx.example.org (Postfix) with ESMTP id 4BC12345
\tfor <Ann@example.org>; Mon, 16 Jun 2025 10:00:04 +0200 (CEST)
Message-ID: <77.ann@list.test>
From: News <news@list.test>
To: Ann@example.org
Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=
Date: Mon, 16 Jun 2025 08:00:00 +0000

--4BC12345.1750060805/mx.example.org--
""")

EXCHANGE: Final = mail("""
From: <postmaster@outlook.example>
To: <news@list.test>
Date: Mon, 16 Jun 2025 08:00:06 +0000
Content-Type: multipart/report; report-type=delivery-status;
\tboundary="1b0b2c5f-4a5e-4d5e-8e3a-0123456789ab"
X-MS-Exchange-Message-Is-Ndr:
Message-ID: <8f7d@DB9PR02.eurprd02.prod.outlook.example>
Subject: Undeliverable: Hello
Auto-Submitted: auto-replied
MIME-Version: 1.0

--1b0b2c5f-4a5e-4d5e-8e3a-0123456789ab
Content-Type: multipart/alternative; differences=Content-Type;
\tboundary="2c5f-alt"

--2c5f-alt
Content-Type: text/plain; charset="us-ascii"
Content-Transfer-Encoding: quoted-printable

Your message to bob@example.net couldn't be delivered.

--2c5f-alt
Content-Type: text/html; charset="us-ascii"
Content-Transfer-Encoding: quoted-printable

<p>Your message to <b>bob@example.net</b> couldn&#8217;t be delivered.</p>

--2c5f-alt--

--1b0b2c5f-4a5e-4d5e-8e3a-0123456789ab
Content-Type: message/delivery-status

Reporting-MTA: dns;DB9PR02MB1234.eurprd02.prod.outlook.example
Received-From-MTA: dns;mq.list.test
Arrival-Date: Mon, 16 Jun 2025 08:00:05 +0000

Final-Recipient: rfc822;bob@example.net
Action: failed
Status: 5.1.10
Diagnostic-Code: smtp;550 5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient bob@example.net not found
 by SMTP address lookup

--1b0b2c5f-4a5e-4d5e-8e3a-0123456789ab
Content-Type: message/rfc822

Received: from mq.list.test (192.0.2.1) by DB9PR02.outlook.example; Mon, 16 Jun 2025 08:00:05 +0000
Message-ID: <78.bob@list.test>
Subject: Hello
To: bob@example.net

Hello Bob

--1b0b2c5f-4a5e-4d5e-8e3a-0123456789ab--
""")

GMAIL: Final = mail("""
From: Mail Delivery Subsystem <mailer-daemon@googlemail.example>
To: news@list.test
Auto-Submitted: auto-replied
Subject: Delivery Status Notification (Failure)
References: <79.cy@list.test>
In-Reply-To: <79.cy@list.test>
X-Failed-Recipients: cy@gmail.example
Message-ID: <684fd@mx.google.example>
Date: Mon, 16 Jun 2025 01:00:07 -0700 (PDT)
Content-Type: multipart/report; boundary="00000000000096f5a706"; report-type=delivery-status

--00000000000096f5a706
Content-Type: multipart/related; boundary="00000000000096faf506"

--00000000000096faf506
Content-Type: multipart/alternative; boundary="00000000000096fb0107"

--00000000000096fb0107
Content-Type: text/plain; charset="UTF-8"

** Address not found **

--00000000000096fb0107--
--00000000000096faf506
Content-Type: image/png; name="icon.png"
Content-Transfer-Encoding: base64

iVBORw0KGgo=
--00000000000096faf506--
--00000000000096f5a706
Content-Type: message/delivery-status

Reporting-MTA: dns; googlemail.example
Arrival-Date: Mon, 16 Jun 2025 01:00:06 -0700 (PDT)
X-Original-Message-ID: <79.cy@list.test>

Final-Recipient: rfc822; cy@gmail.example
Action: failed
Status: 5.1.1
Remote-MTA: dns; gmail-smtp-in.l.google.example. (192.0.2.26, the server for the domain.)
Diagnostic-Code: smtp; 550-5.1.1 The email account that you tried to reach does not exist.
Last-Attempt-Date: Mon, 16 Jun 2025 01:00:07 -0700 (PDT)

--00000000000096f5a706
Content-Type: message/rfc822

Message-ID: <79.cy@list.test>
Subject: Hello

Hello Cy
--00000000000096f5a706--
""")

EXIM: Final = mail("""
X-Failed-Recipients: dora@example.org
Auto-Submitted: auto-replied
From: Mail Delivery System <Mailer-Daemon@mx.example.org>
To: news@list.test
Subject: Mail delivery failed: returning message to sender
Message-Id: <E1uR4Xy-000123-AB@mx.example.org>
Date: Mon, 16 Jun 2025 10:00:08 +0200

This message was created automatically by mail delivery software.

A message that you sent could not be delivered to one or more of its
recipients. This is a permanent error. The following address(es) failed:

  dora@example.org
    host mail.example.org [192.0.2.8]
    SMTP error from remote mail server after RCPT TO:<dora@example.org>:
    550 5.2.1 mailbox disabled

------ This is a copy of the message, including all the headers. ------

Return-path: <news@list.test>
Received: from mq.list.test by mx.example.org with esmtp id 1uR4Xy-000123-AB
Message-ID: <80.dora@list.test>
Subject: Hello

Hello Dora
""")

EXIM_DELAYED: Final = mail("""
Auto-Submitted: auto-replied
From: Mail Delivery System <Mailer-Daemon@mx.example.org>
Subject: Warning: message 1uR4Xy-000123-AB delayed 24 hours

This message was created automatically by mail delivery software.
A message that you sent has not yet been delivered to one or more of its
recipients after more than 24 hours on the queue on mx.example.org.

The address to which the message has not yet been delivered is:

  dora@example.org

No action is required on your part. Delivery attempts will continue for
some time.
""")

QMAIL: Final = mail("""
From: MAILER-DAEMON@mx.example.net
To: news@list.test
Subject: failure notice

Hi. This is the qmail-send program at mx.example.net.
I'm afraid I wasn't able to deliver your message to the following addresses.
This is a permanent error; I've given up. Sorry it didn't work out.

<eve@example.net>:
192.0.2.9 does not like recipient.
Remote host said: 550 5.1.1 unknown user
Giving up on 192.0.2.9.

<finn@example.net>:
Sorry, no mailbox here by that name. (#5.1.1)

--- Below this line is a copy of the message.

Return-Path: <news@list.test>
Received: (qmail 1234 invoked from network); 16 Jun 2025 08:00:09 -0000
Message-ID: <81.eve@list.test>
Subject: Hello

Hello Eve
""")

EXCHANGE_OLD: Final = mail("""
From: System Administrator <postmaster@example.net>
To: news@list.test
Subject: Undeliverable: Hello
MIME-Version: 1.0
Content-Type: text/plain; charset="iso-8859-1"

Your message

  To:      gus@example.net
  Subject: Hello
  Sent:    Mon, 16 Jun 2025 10:00:10 +0200

did not reach the following recipient(s):

gus@example.net on Mon, 16 Jun 2025 10:00:11 +0200
    The e-mail account does not exist at the organization this message was
sent to.  Check the e-mail address, or contact the recipient directly.
            <mx.example.net #5.1.1>
""")

SENDMAIL_OLD: Final = mail("""
From: Mail Delivery Subsystem <MAILER-DAEMON@mx.example.net>
Subject: Returned mail: see transcript for details

The original message was received at Mon, 16 Jun 2025 10:00:12 +0200
from mq.list.test [192.0.2.1]

   ----- The following addresses had permanent fatal errors -----
<hal@example.net>
    (reason: 553 5.3.0 <hal@example.net>... No such user)

   ----- Transcript of session follows -----
... while talking to mail.example.net.:
>>> RCPT To:<hal@example.net>
<<< 553 5.3.0 <hal@example.net>... No such user
""")

GMAIL_OLD: Final = mail("""
From: Mail Delivery Subsystem <mailer-daemon@googlemail.example>
To: news@list.test
X-Failed-Recipients: ida@example.net
Subject: Delivery Status Notification (Failure)
Content-Type: text/plain; charset=ISO-8859-1

Delivery to the following recipient failed permanently:

     ida@example.net

Technical details of permanent failure:
The error that the other server returned was:
554 5.7.1 Message rejected as spam

----- Original message -----

Received: by 192.0.2.10 with SMTP id x
Message-ID: <82.ida@list.test>

Hello Ida
""")

YAHOO_COMPLAINT: Final = mail("""
From: Yahoo Feedback <feedback@arf.mail.yahoo.example>
To: fbl@list.test
Subject: FW: Hello
Date: Mon, 16 Jun 2025 08:00:14 +0000
MIME-Version: 1.0
Content-Type: multipart/report; boundary="yahoo-cfl-1"; report-type="feedback-report"

--yahoo-cfl-1
Content-Type: text/plain; charset="US-ASCII"

This is an email abuse report for an email message received from list.test.

--yahoo-cfl-1
Content-Type: message/feedback-report
Content-Transfer-Encoding: quoted-printable

Feedback-Type: abuse
User-Agent: Yahoo!-Mail-Feedback/2.0
Version: 0.1
Original-Mail-From: <news@list.test>
Original-Rcpt-To: jo@yahoo.example
Received-Date: Mon, 16 Jun 2025 08:00:00 UTC
Reported-Domain: list.test
Source-IP: 192.0.2.1

--yahoo-cfl-1
Content-Type: message/rfc822
Content-Disposition: inline

Received: from 192.0.2.1 by mta.yahoo.example
Message-ID: <83.jo@list.test>
From: News <news@list.test>
To: jo@yahoo.example
Subject: Hello

Hello Jo
--yahoo-cfl-1--
""")

JMRP: Final = mail("""
From: staff@hotmail.example
To: fbl@list.test
Subject: complaint about message from 192.0.2.1
Date: Mon, 16 Jun 2025 08:00:15 +0000
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="jmrp"

--jmrp
Content-Type: message/rfc822
Content-Disposition: inline

X-HmXmrOriginalRecipient: kim@hotmail.example
X-Reporter-IP: 198.51.100.4
From: News <news@list.test>
Message-ID: <84.kim@list.test>
Subject: Hello

Hello Kim
--jmrp--
""")

OUT_OF_OFFICE: Final = mail("""
From: Lea <lea@example.org>
To: news@list.test
Subject: =?iso-8859-1?Q?Automatische_Antwort:_Gr=FC=DFe?=
In-Reply-To: <85.lea@list.test>
X-MS-Exchange-Inbox-Rules-Loop: lea@example.org
X-Auto-Response-Suppress: All
Auto-Submitted: auto-generated
Content-Type: text/plain; charset="iso-8859-1"

Ich bin im Urlaub.
""")

VACATION: Final = mail("""
From: Max <max@example.org>
To: news@list.test
Subject: Re: Hello
Auto-Submitted: auto-replied (vacation)
Precedence: bulk

Away until Monday. For what is undeliverable ask ann@example.org.
""")

ALL: Final = {
    name: value for name, value in sorted(globals().items()) if isinstance(value, bytes)
} | {"TLS": tls_mail()}
