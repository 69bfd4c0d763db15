"""Reports in the shapes that large mail servers send, with names of our own."""

from __future__ import annotations

from typing import Final


def mail(text: str) -> bytes:
    return text.lstrip("\n").replace("\n", "\r\n").encode()


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
